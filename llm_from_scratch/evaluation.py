"""Scores that can be believed: bits per byte, multiple choice, exact match and pass@k, the 95 % interval of a score, and the difference that a test can see.

Written from chapters/15_evaluation.py by `make export`: edit there.
"""

import functools
import math
import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import stats

from llm_from_scratch.bigram import NGram
from llm_from_scratch.datasets import Play, plays
from llm_from_scratch.ledger import Interval
from llm_from_scratch.llama import Llama, init_cache
from llm_from_scratch.tokenizer import Tokenizer

Z95 = float(stats.norm.ppf(0.975))  # 1.96


def interval_ends(
    share: Float[np.ndarray, "*B"], n: int, method: str = "wilson"
) -> tuple[Float[np.ndarray, "*B"], Float[np.ndarray, "*B"]]:
    """Low and high ends of the 95 % interval of a share of n items that were right or wrong.

    "gaussian": share ± z·√(share(1 − share)/n), the paper's (§5.1.1); "wilson": every p that would
    make the share no surprise; "bootstrap": quantiles of shares of n items drawn again.
    Raises ValueError for another method.
    """
    share = np.asarray(share, float)
    if method == "gaussian":
        half = Z95 * np.sqrt(share * (1 - share) / n)
        return share - half, share + half
    if method == "wilson":
        centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = np.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
        return centre - Z95 * half, centre + Z95 * half
    if method == "bootstrap":
        return tuple(stats.binom.ppf(tail, n, share) / n for tail in (0.025, 0.975))
    raise ValueError(f"no method {method!r}; there are gaussian, wilson, bootstrap")


def confidence_interval(
    scores: Sequence[float], method: str = "wilson", *, unit: str = "%", digits: int = 1
) -> Interval:
    """The mean of per-item scores in per cent, with its 95 % interval over items (see `interval_ends`).

    Scores are 0 or 1; for "bootstrap" anything from 0 to 1 (2,000 resamples, seeded). The items must be
    independent. Raises ValueError for no scores, and for scores that the method can't take.
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 1 or not len(scores) or not ((0 <= scores) & (scores <= 1)).all():
        raise ValueError("scores must be a list of at least one number from 0 to 1")
    n, share = len(scores), scores.mean()
    if method == "bootstrap":
        draws = np.random.default_rng(0).integers(0, n, (2000, n))
        low, high = np.quantile(scores[draws].mean(1), [0.025, 0.975])
    elif set(scores) <= {0.0, 1.0}:
        low, high = interval_ends(share, n, method)
    else:
        raise ValueError(f"{method} is for scores of 0 and 1: take method='bootstrap'")
    return Interval(100 * share, 100 * float(low), 100 * float(high), n, unit, digits)


def detectable_difference(
    n: int, share: float, *, disagreement: float | None = None, power: float = 0.8
) -> float:
    """The true difference, in per cent, that a 95 % test on n items finds with the given power.

    Two models on different items, both near `share`; or, with `disagreement` (the share of items on
    which exactly one of them is right), on the same items. Raises ValueError unless n ≥ 1 and the
    shares are from 0 to 1.
    """
    shares = (share, power, 0 if disagreement is None else disagreement)
    if n < 1 or not all(0 <= x <= 1 for x in shares):
        raise ValueError(f"n must be ≥ 1 and shares from 0 to 1, got n={n}, {shares}")
    variance = 2 * share * (1 - share) if disagreement is None else disagreement
    return 100 * (Z95 + float(stats.norm.ppf(power))) * math.sqrt(variance / n)


def excerpt(size: int = 16_000) -> list[str]:
    """The first whole lines of each validation play, at most `size` characters: for bits per byte."""
    return [play.text[:size].rpartition("\n")[0] + "\n" for play in plays("validation")]


@dataclass(frozen=True)
class Item:
    """One question: a model continues `prompt` by each choice; `answer` is the index of the right one.

    `prior` is the prompt without the text that the question is about, for the score "prior".
    Raises ValueError for an answer that is no index, and for an empty choice.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    prior: str = ""

    def __post_init__(self):
        if not 0 <= self.answer < len(self.choices) or not all(self.choices):
            raise ValueError(f"answer {self.answer} of {len(self.choices)} choices: {self.choices}")


def choice_ids(
    tokenizer: Tokenizer, prompt: str, choices: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """The ids that prompt and prompt + choice have in common, BOS first, and what follows for each choice.

    The whole texts are encoded. Where tokens reach over the end of the prompt, the common part is
    shorter than the prompt, and its last characters are scored with every choice. Raises ValueError
    if nothing is common: an empty prompt, and a tokenizer without BOS.
    """
    bos = tokenizer.bos_id is not None
    wholes = [tokenizer.encode(prompt + choice, bos=bos) for choice in choices]
    common = tokenizer.encode(prompt, bos=bos)
    for ids in wholes:
        while ids[: len(common)] != common:
            common = common[:-1]
    if not common:
        raise ValueError(f"no token before {choices[0]!r}, and the tokenizer has no BOS")
    return common, [ids[len(common) :] for ids in wholes]


@eqx.filter_jit
def choice_log_probs(
    model: Llama,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    feeds: Int[Array, "B N C"],
    targets: Int[Array, "B N C"],
) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """Log-probability in nats of N choices after each prompt, and whether greedy decoding writes them.

    Prompts are padded on the right to T; `lengths` counts their true tokens. A feed is the prompt's last
    token and the choice without its last; targets are the choice, −1 beyond it.
    """
    batch, n_choices, width = feeds.shape
    cache = init_cache(model.config, batch, prompts.shape[1] + width, model.embedding.dtype)
    _, cache = model.hidden(prompts, cache=cache)
    cache = replace(cache, length=lengths)
    cache = jax.tree.map(lambda x: jnp.repeat(x[:, None], n_choices, axis=1), cache)
    logits, _ = model(feeds, cache=cache)
    logits = logits.astype(jnp.float32)
    at = jnp.maximum(targets, 0)[..., None]
    chosen = jnp.take_along_axis(logits, at, axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    greedy = (logits.argmax(-1) == targets) | (targets < 0)
    return jnp.where(targets >= 0, chosen, 0).sum(-1), greedy.all(-1)


def padded_choices(
    parts: Sequence[tuple[list[int], list[list[int]]]], context: int
) -> tuple[np.ndarray, ...]:
    """Prompts, lengths, feeds and targets of `choice_log_probs` from the `choice_ids` of every item.

    A prompt that is too long for the context loses its oldest tokens. Raises ValueError if a choice
    alone fills the context.
    """
    width = -(-max(len(choice) for _, row in parts for choice in row) // 4) * 4
    room = context - width
    if room < 1:
        raise ValueError(f"choices of {width} tokens leave no room in a context of {context}")
    kept = [prompt[-room:] for prompt, _ in parts]
    length = -(-max(map(len, kept)) // 16) * 16
    prompts = np.zeros((len(parts), length), np.int32)
    feeds = np.zeros((len(parts), len(parts[0][1]), width), np.int32)
    targets = np.full(feeds.shape, -1, np.int32)
    for i, (prompt, (_, row)) in enumerate(zip(kept, parts, strict=True)):
        prompts[i, : len(prompt) - 1] = prompt[:-1]
        for j, choice in enumerate(row):
            feeds[i, j, : len(choice)] = [prompt[-1], *choice[:-1]]
            targets[i, j, : len(choice)] = choice
    return prompts, np.array([len(p) - 1 for p in kept], np.int32), feeds, targets


@dataclass(frozen=True)
class Scores:
    """What a model gives the choices of N items, arrays "N C": log-probabilities in nats, and sizes.

    `prior` is the log-probability after the item's prior, None if not asked for; `greedy` says which
    choice greedy decoding would write; `answers` holds the right indices, shape (N,).
    """

    log_probs: Float[np.ndarray, "N C"]
    prior: Float[np.ndarray, "N C"] | None
    tokens: Int[np.ndarray, "N C"]
    n_bytes: Int[np.ndarray, "N C"]
    greedy: Bool[np.ndarray, "N C"]
    answers: Int[np.ndarray, " N"]

    def by(self, rule: str) -> Float[np.ndarray, "N C"]:
        """The scores by a rule: "raw", per "token", per "byte", or against the "prior"."""
        rules = {
            "raw": lambda: self.log_probs,
            "token": lambda: self.log_probs / self.tokens,
            "byte": lambda: self.log_probs / self.n_bytes,
            "prior": lambda: self.log_probs - self.prior,
        }
        if rule not in rules:
            raise ValueError(f"no rule {rule!r}; there are {', '.join(rules)}")
        if rule == "prior" and self.prior is None:
            raise ValueError("these scores have no prior: multiple_choice(..., prior=True)")
        return rules[rule]()

    def correct(self, rule: str = "byte") -> Bool[np.ndarray, " N"]:
        """Whether the best choice by a rule (of equals, the first) is the right one, for every item."""
        return self.by(rule).argmax(1) == self.answers


def _log_probs(model, tokenizer, prompts, choices, batch, context):
    """Log-probabilities and greedy flags of every choice after its prompt, and their tokens, (N, C)."""
    parts = [
        choice_ids(tokenizer, prompt, row) for prompt, row in zip(prompts, choices, strict=True)
    ]
    arrays = padded_choices(parts, context)
    sums, greedy = [], []
    for start in range(0, len(parts), batch):
        at = np.minimum(np.arange(start, start + batch), len(parts) - 1)
        found = choice_log_probs(model, *(jnp.asarray(array[at]) for array in arrays))
        kept = min(batch, len(parts) - start)
        sums.append(np.asarray(found[0])[:kept])
        greedy.append(np.asarray(found[1])[:kept])
    tokens = np.array([[len(choice) for choice in row] for _, row in parts])
    return np.concatenate(sums), np.concatenate(greedy), tokens


def multiple_choice(
    model: Llama,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    prior: bool = False,
    batch: int = 8,
    context: int | None = None,
) -> Scores:
    """Score the choices of multiple-choice items by their log-likelihood after the prompt.

    Each prompt is read once, into a KV cache that its choices share. A prompt that exceeds `context`
    (default: the model's max_seq_len) loses its oldest tokens. With `prior` the choices are scored after
    the items' priors, too. Accuracy: `.correct("byte").mean()`.
    Raises ValueError without items, and for items with different numbers of choices.
    """
    if len({len(item.choices) for item in items}) != 1:
        raise ValueError(f"{len(items)} items: need at least one, all with as many choices")
    choices = [item.choices for item in items]
    context = model.config.max_seq_len if context is None else context
    score = functools.partial(_log_probs, model, tokenizer, batch=batch, context=context)
    sums, greedy, tokens = score([item.prompt for item in items], choices)
    before = score([item.prior for item in items], choices)[0] if prior else None
    n_bytes = np.array([[len(choice.encode()) for choice in row] for row in choices])
    answers = np.array([item.answer for item in items])
    return Scores(sums, before, tokens, n_bytes, greedy, answers)


def ngram_choice(model: NGram, items: Sequence[Item]) -> Scores:
    """`multiple_choice` for a byte n-gram model of chapter 01: its tokens are bytes."""

    def score(prompts: list[str]) -> np.ndarray:
        texts = [
            (prompt.encode()[-8:], choice.encode())
            for prompt, item in zip(prompts, items, strict=True)
            for choice in item.choices
        ]
        logs = model.log_prob([prompt + choice for prompt, choice in texts])
        ends = np.cumsum([len(prompt) + len(choice) for prompt, choice in texts])
        sums = [
            logs[end - len(choice) : end].sum()
            for end, (_, choice) in zip(ends, texts, strict=True)
        ]
        return np.reshape(sums, (len(items), -1))

    n_bytes = np.array([[len(choice.encode()) for choice in item.choices] for item in items])
    answers = np.array([item.answer for item in items])
    prior = score([item.prior for item in items])
    unknown = np.zeros(n_bytes.shape, bool)
    return Scores(score([item.prompt for item in items]), prior, n_bytes, n_bytes, unknown, answers)


@dataclass(frozen=True)
class Turn:
    """A speech and where it stands: `begin` is the offset of the speaker's name in the play's text."""

    play: Play
    scene: tuple[str, str]
    speaker: str
    lines: tuple[str, ...]
    begin: int


def turns(play: Play) -> list[Turn]:
    """The speeches of a play that begin with the speaker's name and a line, with their offsets."""
    found, cursor = [], 0
    for speech in play.speeches:
        begin = play.text.find(f"\n\n{speech.speaker}\n{speech.lines[0]}", cursor)
        if speech.speaker and begin >= 0:
            cursor = begin + 2
            scene = (speech.act, speech.scene)
            found.append(Turn(play, scene, speech.speaker, speech.lines, cursor))
    return found


def tail(text: str, size: int) -> str:
    """The last `size` characters of a text, from the first whole line on."""
    return text if len(text) <= size else text[-size:].partition("\n")[2]


CONTEXT = 400  # characters of the play that every model reads before a question


def drawn(items: Sequence[Item], n: int, chooser: random.Random) -> list[Item]:
    """n of the items, in a random order. Raises ValueError if there are fewer."""
    if len(items) < n:
        raise ValueError(f"{n} items wanted, {len(items)} are there")
    return chooser.sample(items, n)


def shuffled(right: str, wrong: Sequence[str], chooser: random.Random) -> tuple[tuple, int]:
    """The choices in a random order, and where the right one stands."""
    choices = [right, *wrong]
    chooser.shuffle(choices)
    return tuple(choices), choices.index(right)


QUESTIONS = {
    "speaker": {"play": ("", "{}\n"), "question": ("Question: Who speaks next?\nAnswer:", " {}\n")},
    "line": {"play": ("", "{}"), "question": ("\nQuestion: Which line follows?\nAnswer:", " {}")},
}


def ask(text: str, choices: Sequence[str], answer: int, task: str, template: str) -> Item:
    """An item from a piece of a play: "play" lets the text go on, "question" asks in English."""
    asked, form = QUESTIONS[task][template]
    wrapped = tuple(form.format(choice) for choice in choices)
    return Item(tail(text, CONTEXT) + asked, wrapped, answer, asked)


def speaker_items(split: str, n: int = 200, *, template: str = "play", seed: int = 0) -> list[Item]:
    """Who speaks next? n questions with four speakers of the scene, the last speaker not among them.

    Each of the four has at least three speeches in the scene. Raises KeyError for an unknown
    template, ValueError if the split has fewer than n questions.
    """
    chooser, items = random.Random(seed), []
    for play in plays(split):
        told = turns(play)
        count = Counter((turn.scene, turn.speaker) for turn in told)
        for before, turn in zip(told, told[1:], strict=False):
            present = [name for (scene, name), k in count.items() if scene == turn.scene and k >= 3]
            others = sorted({*present} - {before.speaker, turn.speaker})
            if before.scene != turn.scene or before.speaker == turn.speaker:
                continue
            if turn.speaker in present and len(others) >= 3:
                choices = shuffled(turn.speaker, chooser.sample(others, 3), chooser)
                items.append(ask(play.text[: turn.begin], *choices, "speaker", template))
    return drawn(items, n, chooser)


def line_items(split: str, n: int = 200, *, template: str = "play", seed: int = 0) -> list[Item]:
    """Which line follows? n questions: a line from inside a speech, and three from inside others.

    The wrong lines come from other scenes of the same play. Errors as in `speaker_items`.
    """
    chooser, items = random.Random(seed), []
    for play in plays(split):
        told = [turn for turn in turns(play) if len(turn.lines) >= 4]
        for turn in told:
            line = turn.lines[chooser.randrange(2, len(turn.lines) - 1)]
            at = play.text.find(f"\n{line}\n", turn.begin) + 1
            elsewhere = [x for t in told if t.scene != turn.scene for x in t.lines[2:-1]]
            choices = shuffled(line, chooser.sample(elsewhere, 3), chooser)
            items.append(ask(play.text[:at], *choices, "line", template))
    return drawn(items, n, chooser)


_EDGES = str.maketrans("", "", string.punctuation)


def plain_answer(text: str) -> str:
    """A text in lower case, without punctuation, articles and doubled spaces (as SQuAD's script has it)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_EDGES)).split())


def exact_match(prediction: str, answers: str | Sequence[str], *, strict: bool = False) -> bool:
    """Whether a prediction is one of the answers: after `plain_answer`, or letter by letter if strict.

    Raises ValueError if there is no answer.
    """
    answers = [answers] if isinstance(answers, str) else list(answers)
    if not answers:
        raise ValueError("exact_match needs at least one answer")
    form = str if strict else plain_answer
    return form(prediction) in {form(answer) for answer in answers}


def pass_at_k(n: int, c: Int[np.ndarray, "*B"] | int, k: int) -> Float[np.ndarray, "*B"]:
    """The unbiased estimate of pass@k, from n generations of a problem of which c passed its tests.

    1 − C(n − c, k)/C(n, k): the share of all k-subsets with a pass in them. Shaped like c; average it
    over problems. Raises ValueError unless 1 ≤ k ≤ n and 0 ≤ c ≤ n.
    """
    c = np.asarray(c)
    if not 1 <= k <= n or (c < 0).any() or (c > n).any():
        raise ValueError(f"need 1 <= k <= n and 0 <= c <= n, got n={n}, k={k}, c={c}")
    i = np.arange(k)
    failing = np.maximum(n - c[..., None] - i, 0) / (n - i)
    return 1 - failing.prod(-1)
