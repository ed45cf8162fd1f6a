"""Learning from examples in the prompt: few-shot prompts and their scores, attention maps, induction heads found and removed, and loss against size.

Written from chapters/16_in_context_learning.py by `make export`: edit there.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_from_scratch.generation import prefill
from llm_from_scratch.llama import (
    Llama,
    LlamaConfig,
    accumulator,
    check_inputs,
    cross_entropy,
    embed,
    rope_frequencies,
    rope_rotation,
)
from llm_from_scratch.pretraining import make_optimizer
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.training import fit


@dataclass(frozen=True)
class Template:
    """How a task is written down: an instruction, and the forms of a question and of an answer.

    `question` and `answer` hold one pair of braces each. The answer follows the question directly: it
    should begin with a space, as tokens do. Raises ValueError for forms without such a place, or with more.
    """

    question: str
    answer: str
    instruction: str = ""

    def __post_init__(self):
        for name in ("question", "answer"):
            form = getattr(self, name)
            if form.count("{}") != 1 or form.count("{") + form.count("}") != 2:
                raise ValueError(f"{name} must hold one {{}} and no other brace, got {form!r}")


def few_shot(template: Template, examples: Sequence[tuple[str, str]], query: str) -> str:
    """The prompt for a query after K worked examples; K = 0 is zero-shot, K = 1 one-shot.

    Instruction, then question and answer of every example, then the query's question.
    Source: Brown et al. 2020, §2.
    """
    shown = [template.question.format(x) + template.answer.format(y) for x, y in examples]
    return template.instruction + "".join(shown) + template.question.format(query)


KINDS = {
    "animal": """dog cat horse cow sheep goat pig lion tiger bear wolf fox rabbit mouse deer camel donkey
        monkey zebra giraffe elephant kangaroo squirrel otter badger hamster leopard buffalo hedgehog beaver""",
    "fruit": """apple pear banana grape cherry peach plum lemon lime mango papaya apricot fig date melon
        raspberry strawberry blueberry blackberry pineapple coconut kiwi grapefruit tangerine nectarine
        pomegranate guava cranberry quince lychee""",
    "country": """France Spain Italy Germany Poland Norway Sweden Finland Denmark Greece Turkey Egypt Kenya
        Nigeria Ghana Morocco India China Japan Vietnam Thailand Brazil Peru Chile Mexico Canada Portugal
        Ireland Austria Hungary""",
    "color": """red blue green yellow purple pink brown black white gray violet crimson scarlet turquoise
        magenta indigo beige maroon teal azure lavender amber ivory cyan mauve khaki ochre gold silver tan""",
    "tool": """hammer saw screwdriver wrench drill axe chisel pliers shovel rake ladder file clamp spade
        sickle crowbar mallet anvil lathe trowel hoe pickaxe sander plunger scythe hatchet toolbox jigsaw
        spanner vise""",
    "sport": """tennis football basketball baseball hockey golf rugby cricket swimming boxing wrestling
        fencing rowing sailing cycling skiing skating surfing volleyball badminton archery judo karate
        gymnastics polo handball softball bowling climbing diving""",
    "job": """doctor nurse teacher lawyer farmer baker butcher carpenter plumber electrician pilot sailor
        soldier judge painter writer actor singer dancer engineer scientist chemist tailor barber waiter
        cook clerk librarian journalist dentist""",
    "clothing": """shirt trousers skirt dress coat jacket hat scarf glove sock shoe boot belt tie sweater
        blouse jeans shorts vest sandal slipper apron cap cardigan hoodie pajamas bikini tunic shawl robe""",
}


def kind_task(n_examples: int = 5, seed: int = 0) -> tuple[list, list]:
    """Pairs (word, kind): `n_examples` of every kind to give as examples, the other words to ask about.

    Both lists are in a random order. Raises ValueError unless 0 < n_examples < 30.
    """
    if not 0 < n_examples < 30:
        raise ValueError(f"n_examples must be between 1 and 29 of 30, got {n_examples}")
    chooser, examples, questions = random.Random(seed), [], []
    for kind, text in KINDS.items():
        words = chooser.sample(text.split(), 30)
        examples += [(word, kind) for word in words[:n_examples]]
        questions += [(word, kind) for word in words[n_examples:]]
    chooser.shuffle(examples)
    chooser.shuffle(questions)
    return examples, questions


def mood_task(seed: int = 0) -> tuple[list, list]:
    """Pairs (sentence, mood), like ("The soup was awful.", "negative"): 40 examples, 200 questions.

    Questions and examples share no adjective; five subjects go with every adjective.
    """
    subjects = "soup film book hotel concert teacher weather service music journey".split()
    good = """good great lovely excellent delightful superb fine pleasant perfect charming splendid
        brilliant beautiful amazing fantastic enjoyable wonderful impressive marvellous awesome
        fabulous magnificent pleasing outstanding"""
    bad = """bad awful terrible horrible dreadful poor nasty unpleasant disappointing miserable boring
        dull annoying ugly disgusting lousy hopeless mediocre frustrating appalling atrocious
        unbearable tedious pathetic"""
    chooser, examples, questions = random.Random(seed), [], []
    for mood, text in (("positive", good), ("negative", bad)):
        for i, adjective in enumerate(chooser.sample(text.split(), 24)):
            pairs = [(f"The {s} was {adjective}.", mood) for s in chooser.sample(subjects, 5)]
            (examples if i < 4 else questions).extend(pairs)
    chooser.shuffle(examples)
    chooser.shuffle(questions)
    return examples, questions


def draw(pool: Sequence, k: int, number: int, seed: int = 0) -> list:
    """K examples for question `number`, the first K of one random order of the pool.

    Fewer examples are a part of more. Raises ValueError for more than there are.
    """
    if not 0 <= k <= len(pool):
        raise ValueError(f"k must be from 0 to {len(pool)}, the size of the pool, got {k}")
    order = np.random.default_rng([seed, number]).permutation(len(pool))
    return [pool[i] for i in order[:k]]


def label_log_probs(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    labels: Sequence[str],
    *,
    width: int | None = None,
    batch: int = 8,
) -> Float[np.ndarray, "N C"]:
    """Log-probability in nats of each label's first token, right after each prompt.

    A prompt begins with BOS if the tokenizer has one, and is padded on the right to `width` tokens
    (default: the longest, rounded up to 16). Raises
    ValueError for no prompts, for labels that are empty or begin with the same token, and for a prompt
    longer than `width`.
    """
    if not prompts or not all(labels):
        raise ValueError(f"need a prompt, and no empty label; got {len(prompts)}, {list(labels)}")
    first = [tokenizer.encode(label)[0] for label in labels]
    if len(set(first)) != len(labels):
        raise ValueError(f"two labels begin with the same token: {list(labels)}")
    bos = tokenizer.bos_id is not None
    ids = [tokenizer.encode(prompt, bos=bos) for prompt in prompts]
    longest = max(map(len, ids))
    width = -(-longest // 16) * 16 if width is None else width
    if longest > width:
        raise ValueError(f"a prompt of {longest} tokens does not fit width={width}")
    ids += [ids[-1]] * (-len(ids) % batch)  # fill the last batch
    lengths = np.array([len(row) for row in ids], np.int32)
    tokens = np.array([row + [0] * (width - len(row)) for row in ids], np.int32)
    found = []
    for start in range(0, len(ids), batch):
        rows = slice(start, start + batch)
        logits, _ = prefill(model, jnp.array(tokens[rows]), jnp.array(lengths[rows]), width)
        found.append(jax.nn.log_softmax(logits.astype(jnp.float32))[:, jnp.array(first)])
    return np.concatenate(found)[: len(prompts)]


@dataclass(frozen=True)
class RepeatedBatches:
    """Rows that repeat a block of different random tokens, as batches for `fit`.

    The block is new in every row, its length from `shortest` to `longest`. Targets are −1 in the first
    copy, where nothing can be known. With `pool` > 0 the blocks come from that many fixed ones.
    Raises ValueError unless 1 <= shortest <= longest < length and longest <= vocab_size.
    """

    batch: int = 32
    length: int = 48
    vocab_size: int = 32
    shortest: int = 4
    longest: int = 16
    pool: int = 0
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.shortest <= self.longest <= min(self.length - 1, self.vocab_size):
            raise ValueError(
                f"need 1 <= shortest <= longest < length and longest <= vocab_size, got "
                f"{self.shortest}, {self.longest}, {self.length}, {self.vocab_size}"
            )

    def blocks(self, random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n orders of the vocabulary, and how much of each is the block."""
        periods = random.integers(self.shortest, self.longest + 1, n)
        return random.random((n, self.vocab_size)).argsort(1), periods

    def __call__(self, cursor: int) -> dict[str, Int[np.ndarray, "B T"]]:
        random = np.random.default_rng([self.seed, 1, cursor])
        if self.pool:
            orders, periods = self.blocks(np.random.default_rng([self.seed, 0]), self.pool)
            which = random.integers(0, self.pool, self.batch)
            orders, periods = orders[which], periods[which]
        else:
            orders, periods = self.blocks(random, self.batch)
        place = np.arange(self.length + 1)[None]
        rows = np.take_along_axis(orders, place % periods[:, None], 1).astype(np.int32)
        known = place[:, 1:] > periods[:, None]
        return {"tokens": rows[:, :-1], "targets": np.where(known, rows[:, 1:], -1)}


def tiny_model(n_layers: int, seed: int) -> Llama:
    """A Llama with 32 ids, D = 64 and four heads; its embedding starts ten times larger than usual."""
    config = LlamaConfig(32, 64, n_layers, 4, 4, 128, 16, rope_theta=100.0, max_seq_len=48)
    model = Llama(config, key=jax.random.key(seed))
    return eqx.tree_at(lambda m: m.embedding, model, 10 * model.embedding)


def repeat_loss(model: Llama, batch: dict, key=None):
    """Mean nats over the batch's targets, and their number: a loss for `fit`."""
    logits = model(batch["tokens"])
    return cross_entropy(logits, batch["targets"]), (batch["targets"] >= 0).sum()


def train_tiny(
    n_layers: int, seed: int, *, pool: int = 0, steps: int = 240, evaluate=None, eval_every: int = 0
) -> tuple[Llama, list[dict]]:
    """Train `tiny_model` to continue repeated blocks; returns the model and the rows of `fit`."""
    optimizer = make_optimizer(steps=steps, peak=5e-3, warmup=20, floor=0.1)
    batches = RepeatedBatches(pool=pool, seed=seed)
    options = {"steps": steps, "seed": seed, "evaluate": evaluate, "eval_every": eval_every}
    state, rows = fit(tiny_model(n_layers, seed), repeat_loss, batches, optimizer, **options)
    return state.model, rows


def attention_maps(model: Llama, tokens: Int[Array, "*B T"]) -> Float[Array, "L *B H T T"]:
    """The attention weights of every layer and head: row t says where position t looks. Rows sum to 1.

    One document from position 0 on, no cache. Softmax in fp32. Raises ValueError as the model does.
    """
    check_inputs(model, tokens, None, None, None)
    config, n = model.config, tokens.shape[-1]
    x = embed(model.embedding, tokens)
    positions = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), tokens.shape)
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    rotation = rope_rotation(positions, frequencies, x.dtype)
    causal = jnp.tril(jnp.ones((n, n), bool)).reshape((1,) * tokens.ndim + (n, n))
    wide, maps = accumulator(x.dtype), []
    for block in model.blocks:
        q, k, _ = block.attention.project(block.attention_norm(x), rotation)
        k = jnp.repeat(k, config.n_heads // config.n_kv_heads, axis=-2)
        scores = jnp.einsum("...thd,...shd->...hts", q, k, preferred_element_type=wide)
        scores = scores * wide.type(config.head_dim**-0.5)
        maps.append(jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1))
        x, _ = block(x, rotation)
    return jnp.stack(maps)


def induction_scores(
    maps: Float[Array, "L *B H T T"], tokens: Int[Array, "*B T"]
) -> Float[np.ndarray, "L H"]:
    """How much each head looks at what came after earlier copies of its token, from 0 to 1.

    The mean over positions whose token has occurred before of the summed weight on the successors of
    its earlier occurrences. Source: Olsson et al. 2022, "prefix matching". Raises ValueError if no token repeats.
    """
    tokens = np.asarray(tokens)
    n = tokens.shape[-1]
    same = (tokens[..., :, None] == tokens[..., None, :]) & np.tri(n, n, -1, dtype=bool)
    if not same.any():
        raise ValueError("no token occurs twice: nothing to score")
    successor = np.roll(same, 1, axis=-1)  # the last column of `same` is empty
    weight = np.einsum("...hts,...ts->...ht", np.asarray(maps), successor.astype(np.float32))
    weight = weight.reshape(len(maps), -1, *weight.shape[-2:])
    again = same.any(-1).reshape(-1, n)
    return np.einsum("lbht,bt->lh", weight, again.astype(np.float32)) / again.sum()


@eqx.filter_jit
def logits_and_maps(model: Llama, tokens: Int[Array, "B T"]):
    """The logits of a batch, and its attention maps, in one program."""
    return model(tokens), attention_maps(model, tokens)


def snapshot(model: Llama, batch: dict[str, Int[np.ndarray, "B T"]]) -> dict:
    """Mean nats of the batch's targets; induction and previous-token score of every head, "L H".

    The latter is the mean weight on the token before.
    """
    tokens = jnp.asarray(batch["tokens"])
    logits, maps = logits_and_maps(model, tokens)
    before = np.diagonal(np.asarray(maps), -1, -2, -1).mean((1, 3))
    loss = float(cross_entropy(logits, jnp.asarray(batch["targets"])))
    return {"loss": loss, "induction": induction_scores(maps, tokens), "previous": before}


def ablate(model: Llama, heads: Sequence[tuple[int, int]]) -> Llama:
    """A copy of the model in which these (layer, head) write nothing: their columns of w_out are zero.

    Raises ValueError for a layer or head that does not exist.
    """
    layers, n_heads, width = len(model.blocks), model.config.n_heads, model.config.head_dim
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < n_heads):
            raise ValueError(f"no head {(layer, head)}: {layers} layers of {n_heads} heads")
        columns = slice(head * width, (head + 1) * width)
        silenced = model.blocks[layer].attention.w_out.at[:, columns].set(0)
        model = eqx.tree_at(lambda m, i=layer: m.blocks[i].attention.w_out, model, silenced)
    return model


def lookup_rows(
    n: int, *, n_keys: int = 8, n_values: int = 8, n_pairs: int = 24, vocab_size: int = 32, seed=0
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B C"]]:
    """Rows x₁ y₁ x₂ y₂ … of a random table y = f(x), another one for each row; and its possible values.

    Keys, values and table are drawn for every row, T = 2 · n_pairs.
    Raises ValueError if keys and values do not fit the vocabulary.
    """
    if n_keys + n_values > vocab_size:
        raise ValueError(f"{n_keys} keys and {n_values} values exceed vocab_size={vocab_size}")
    random = np.random.default_rng(seed)
    names = random.random((n, vocab_size)).argsort(1).astype(np.int32)
    keys, values = names[:, :n_keys], names[:, n_keys : n_keys + n_values]
    table = np.take_along_axis(values, random.integers(0, n_values, (n, n_keys)), 1)
    asked = random.integers(0, n_keys, (n, n_pairs))
    pairs = [np.take_along_axis(part, asked, 1) for part in (keys, table)]
    return np.stack(pairs, -1).reshape(n, 2 * n_pairs), values


def lookup_oracle(
    k: Int[np.ndarray, "*B"], n_keys: int = 8, n_values: int = 8
) -> Float[np.ndarray, "*B"]:
    """The best possible accuracy after k pairs of a random table: look the key up, or guess a value."""
    unseen = (1 - 1 / n_keys) ** np.asarray(k)
    return 1 - unseen * (1 - 1 / n_values)


def power_law(sizes: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """Exponent a and coefficient c of loss = c · size^−a, by least squares on the logarithms.

    Raises ValueError for fewer than two sizes and for numbers that are not positive.
    """
    if len(sizes) < 2 or min(sizes) <= 0 or min(losses) <= 0:
        raise ValueError(f"need two positive sizes and losses, got {sizes} and {losses}")
    slope, height = np.polyfit(np.log(sizes), np.log(losses), 1)
    return float(-slope), float(np.exp(height))


def bloom_places(
    items: Sequence[str], n_bits: int, n_hashes: int
) -> Int[np.ndarray, "items n_hashes"]:
    """The bits of each item in a Bloom filter: words of one BLAKE2 digest, modulo the number of bits.

    Raises ValueError unless n_hashes is from 1 to 8 (a digest has 64 bytes) and n_bits is positive.
    """
    if not 1 <= n_hashes <= 8 or n_bits < 1:
        raise ValueError(f"need 1 <= n_hashes <= 8 and n_bits >= 1, got {n_hashes} and {n_bits}")
    digests = [hashlib.blake2b(item.encode(), digest_size=8 * n_hashes).digest() for item in items]
    words = np.frombuffer(b"".join(digests), "<u8").reshape(len(items), n_hashes)
    return (words % n_bits).astype(np.int64)
