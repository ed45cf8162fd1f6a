"""The tokenizer against what a notebook can't show: other libraries, Meta's own code, bad input."""

import ast
import base64
import functools
import hashlib
import json
import random
import unicodedata
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers

from llm_from_scratch.datasets import package_file, plays
from llm_from_scratch.tokenizer import (
    COURSE_SPECIAL,
    LLAMA3_PATTERN,
    LLAMA3_SPECIAL,
    Tokenizer,
    Vocabulary,
    check_ranks,
    count_pieces,
    count_windows,
    cut_runs,
    encode_piece,
    encode_plain,
    merge,
    merges,
    read_ranks,
    sliding_windows,
    split,
    train_bpe,
    write_ranks,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text())
BYTES = {bytes([b]): b for b in range(256)}


@functools.cache
def corpus() -> tuple[str, ...]:
    return tuple(play.text for play in plays())


@functools.cache
def trained() -> Tokenizer:
    return Tokenizer(train_bpe((play.text for play in plays("train")), 4080))


@functools.cache
def llama3() -> Tokenizer:
    return Tokenizer.load(package_file("llama_models", "llama3", "tokenizer.model"), LLAMA3_SPECIAL)


def peer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The `tokenizers` library with the same merges; it writes each byte as a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}

    def spelled(token: bytes) -> str:
        return "".join(letter[b] for b in token)

    bpe = models.BPE(
        vocab={spelled(token): rank for token, rank in tokenizer.ranks.items()},
        merges=[(spelled(a), spelled(b)) for a, b in merges(tokenizer.ranks)],
    )
    other = tokenizers.Tokenizer(bpe)
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return other


def peer_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in peer(tokenizer).encode_batch(texts, add_special_tokens=False)]


def fuzzed(n: int) -> list[str]:
    """Random strings of all scripts; only characters that this Python's Unicode tables know."""
    rng = random.Random(0)
    known = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    contractions = ["'s", "'S", "'re", "'LL", "'\u017f", "'t", "'D", "\u212a", "'VE"]
    white = list(" \n\r\t  \u00a0\u2003\u3000\x0b\x0c\x1c\x1f\x85\u2028\u200b\ufeff")
    common = list("abcdeTHEthou0123456789.,!?-é") + [" the", "nd", "\r\n", "<|eot_id|>", "\x00"]
    pools = [white, contractions, common, common, known, known[:2000]]
    return [
        "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 24))) for _ in range(n)
    ]


# --- the three encoders


def test_three_encoders_agree_on_all_plays():
    together = "\n".join(corpus())
    ids = trained().encode(together)
    assert encode_plain(together, trained().ranks) == ids
    assert trained().encode_batch(corpus()) == peer_ids(trained(), list(corpus()))
    assert len(together) > 4_900_000 and trained().decode(ids) == together


def test_three_encoders_agree_on_fuzzed_strings():
    texts = fuzzed(10_000)
    ids = trained().encode_batch(texts)
    assert ids == [encode_plain(text, trained().ranks) for text in texts]
    assert ids == peer_ids(trained(), texts)
    assert [trained().decode(row) for row in ids] == texts
    assert len(set(texts)) > 9_000


def test_three_libraries_mean_the_same_by_letter_digit_and_space():
    """For all characters that this Python's Unicode tables know; newer ones may differ."""
    known = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    text = "".join(known)
    for kind in (r"\p{L}", r"\p{N}", r"\s"):
        matched = "".join(split(text, kind))
        core = tiktoken.Encoding(kind, pat_str=kind, mergeable_ranks=BYTES, special_tokens={})
        assert core.decode(core.encode_ordinary(text)) == matched
        removed = pre_tokenizers.Split(Regex(kind), behavior="removed").pre_tokenize_str(text)
        assert len("".join(part for part, _ in removed)) == len(text) - len(matched)
        assert len(matched) > 20


def test_split_gives_whole_matches_and_leaves_out_what_a_pattern_does_not_match():
    assert split("To be", r"(\w)(\w)") == ["To", "be"]
    assert split("ab12cd", r"\d|(b|c)\w?") == ["b1", "2", "cd"]
    core = Tokenizer(BYTES, (), r"\d|(?:b|c)\w?")
    assert core.decode(core.encode("ab12cd")) == "b12cd"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_text_round_trip(text):
    assert trained().decode(trained().encode(text)) == text
    assert "".join(split(text)) == text
    assert llama3().decode(llama3().encode(text)) == text


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60))
def test_every_byte_string_has_ids_and_comes_back(data):
    for tokenizer in (trained(), llama3()):
        ids = encode_piece(data, tokenizer.ranks) if data else []
        assert tokenizer.decode_bytes(ids) == data
        assert tokenizer.decode(ids) == data.decode(errors="replace")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=20))
def test_any_ids_decode_as_the_joined_tokens(ids):
    vocabulary = trained()
    names = {id: name.encode() for name, id in vocabulary.special.items()}
    tokens = {rank: token for token, rank in vocabulary.ranks.items()} | names
    assert vocabulary.decode_bytes(ids) == b"".join(tokens[i] for i in ids)


# --- the trainer


def naive_bpe(pieces: Counter, vocab_size: int) -> dict[bytes, int]:
    """An independent trainer on tuples of bytes that counts everything again for each merge."""
    words = {tuple(piece[i : i + 1] for i in range(len(piece))): n for piece, n in pieces.items()}
    ranks = dict(BYTES)
    while len(ranks) < vocab_size:
        counts = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:], strict=False):
                counts[pair] += n
        if not counts:
            break
        a, b = min(counts, key=lambda pair: (-counts[pair], ranks[pair[0]], ranks[pair[1]]))
        ranks[a + b] = len(ranks)
        joined = Counter()
        for word, n in words.items():
            out = []
            for part in word:
                # the part before must be a whole, unjoined a: (a, a, a) becomes (aa, a)
                if out and out[-1] == (a, "open") and part == b:
                    out[-1] = (a + b, "shut")
                else:
                    out.append((part, "open"))
            joined[tuple(part for part, _ in out)] += n
        words = joined
    return ranks


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="ab \n1é", max_size=30), min_size=1, max_size=5))
def test_trainer_equals_naive_trainer(texts):
    assert train_bpe(texts, 280) == naive_bpe(count_pieces(texts), 280)


def test_trainer_equals_naive_trainer_on_a_play():
    text = corpus()[0][:20_000]
    assert train_bpe([text], 400) == naive_bpe(count_pieces([text]), 400)


def test_ties_go_to_the_lowest_ids_and_runs_merge_from_the_left():
    assert list(train_bpe(["ab cd"], 257, pattern=r"\w+"))[256:] == [b"ab"]
    assert list(train_bpe(["cd ab"], 257, pattern=r"\w+"))[256:] == [b"ab"]
    assert merge([1, 1, 1, 1, 1], (1, 1), 2) == [2, 2, 1]
    assert list(train_bpe(["aaaaa"], 300))[256:] == [b"aa", b"aaa", b"aaaaa"]


def test_a_smaller_vocabulary_is_a_prefix_of_a_larger_one():
    text = [corpus()[3]]
    large, small = list(train_bpe(text, 500)), list(train_bpe(text, 350))
    assert small == large[:350]


def test_every_token_is_a_join_of_two_and_encodes_to_itself():
    ranks = trained().ranks
    assert len(ranks) == 4080 and list(ranks.values()) == list(range(4080))
    assert [a + b for a, b in merges(ranks)] == list(ranks)[256:]
    assert all(encode_piece(token, ranks) == [rank] for token, rank in ranks.items())
    assert encode_piece(b"thee", ranks, below=256) == list(b"thee")


def test_guarded_extension_leaves_the_guarded_text_alone():
    english, other = corpus()[5], " ".join(word[::-1] for word in corpus()[6].split())
    base = train_bpe([english], 500)
    free, guarded = (train_bpe([other], 700, base=base, protect=p) for p in ((), [english]))
    assert list(guarded)[:500] == list(base) == list(free)[:500] and len(guarded) == 700
    before = Tokenizer(base).encode(english)
    assert Tokenizer(guarded, ()).encode(english) == before
    assert Tokenizer(free, ()).encode(english) != before
    lengths = [len(Tokenizer(ranks, ()).encode(other)) for ranks in (free, guarded, base)]
    assert lengths[0] < lengths[1] < lengths[2]


def test_extending_a_table_with_rows_that_are_no_joins():
    """In Llama 3's table too; the new merges lead to such a row, which must not get a second id."""
    base = BYTES | {b"abc": 256}
    ranks = train_bpe(["xabc yabc zabc"], 262, base=base)
    assert list(ranks.values()) == list(range(262)) and list(ranks)[:257] == list(base)
    assert list(ranks)[257] == b"ab" and encode_piece(b"abcd", ranks) == [256, ord("d")]
    free = Tokenizer(ranks, ())
    assert free.encode("xabc yabc") == encode_plain("xabc yabc", ranks)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(alphabet="abc ", max_size=30), min_size=1, max_size=4),
    st.lists(st.text(alphabet="abc", min_size=2, max_size=5), max_size=4, unique=True),
)
def test_extended_tables_have_no_gap_and_encode_like_tiktoken(texts, rows):
    base = BYTES | {row.encode(): 256 + i for i, row in enumerate(rows)}
    ranks = train_bpe(texts, 270, base=base)
    assert list(ranks.values()) == list(range(len(ranks))) and len(ranks) <= 270
    assert list(ranks)[: len(base)] == list(base)
    for text in texts:
        assert Tokenizer(ranks, ()).encode(text) == encode_plain(text, ranks)


def test_a_larger_vocabulary_never_compresses_less():
    """Nested tables of one run, on the two held-out plays: each size needs fewer tokens."""
    tables = [
        Tokenizer({token: rank for token, rank in trained().ranks.items() if rank < n}, ())
        for n in (256, 512, 1024, 2048, 4080)
    ]
    for play in plays("validation"):
        needed = [len(table.encode(play.text)) for table in tables]
        assert all(more > fewer for more, fewer in zip(needed, needed[1:], strict=False))
        assert needed[0] == len(play.text.encode()) > 3 * needed[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(texts=["a"], vocab_size=255), "255 is less than the 256 starting tokens"),
        (dict(texts=["a"], vocab_size=300, base={b"a": 0}), "255 of the 256 single bytes"),
        (dict(texts=["a"], vocab_size=300, base=BYTES | {b"ab": 300}), "base ranks must be 0"),
    ],
)
def test_trainer_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(**arguments)


def test_trainer_rejects_a_single_string_and_stops_when_no_pair_is_left():
    with pytest.raises(TypeError, match="several strings"):
        train_bpe("To be", 300)
    for single in ("To be", b"To be"):
        with pytest.raises(TypeError, match="several strings"):
            trained().encode_batch(single)
    assert len(train_bpe(["ab"], 300)) == 257
    assert train_bpe([], 300) == BYTES


# --- Meta's release


def constants_of_metas_code() -> tuple[str, list[str], int]:
    """The pattern, the named special tokens and their number, read from Meta's file as text."""
    tree = ast.parse(package_file("llama_models", "llama3", "tokenizer.py").read_text())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if isinstance(node.value, ast.Constant | ast.List):
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return found["pat_str"], found["special_tokens"], found["num_reserved_special_tokens"]


def test_pattern_and_special_tokens_are_metas():
    pattern, named, number = constants_of_metas_code()
    assert pattern == LLAMA3_PATTERN
    assert list(LLAMA3_SPECIAL[: len(named)]) == named and len(LLAMA3_SPECIAL) == number == 256
    assert {n: i + 128_000 for i, n in enumerate(LLAMA3_SPECIAL)} == GOLDEN["special_tokens"]
    assert COURSE_SPECIAL == LLAMA3_SPECIAL[:16] and "<|eot_id|>" in COURSE_SPECIAL


def test_llama3_has_metas_numbers():
    tokenizer = llama3()
    assert tokenizer.vocab_size == GOLDEN["n_words"] == 128_256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (GOLDEN["bos_id"], GOLDEN["eos_id"])
    assert list(tokenizer.stop_ids) == GOLDEN["stop_tokens"]
    assert tokenizer.special == GOLDEN["special_tokens"]


def test_llama3_gives_metas_ids():
    tokenizer, plain = llama3(), GOLDEN["plain"]
    assert len(plain) > 180 and sum(len(ids) for _, ids in plain) > 1_800
    for text, ids in plain:
        assert tokenizer.encode(text) == ids, text
        assert encode_plain(text, tokenizer.ranks) == ids, text
        assert tokenizer.decode(ids) == text
    for text, ids in GOLDEN["framed"]:
        assert tokenizer.encode(text, bos=True, eos=True) == ids
    for text, ids in GOLDEN["special"]:
        assert tokenizer.encode(text, allowed_special="all") == ids
    assert any(max(ids) >= 128_000 for _, ids in GOLDEN["special"])


def test_llama3_gives_metas_ids_on_long_runs_but_not_where_meta_cuts_words():
    tokenizer = llama3()
    for unit, times, n, digest in GOLDEN["long"]:
        text = unit * times
        ids = tokenizer.encode(text)
        if len(text) > 400_000:  # Meta's code cuts there whatever stands there; ours does not
            assert ids != tokenizer.encode(text[:400_000]) + tokenizer.encode(text[400_000:])
            ids = tokenizer.encode(text[:400_000]) + tokenizer.encode(text[400_000:])
        assert len(ids) == n
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == digest


def test_written_file_is_metas_file(tmp_path):
    original = package_file("llama_models", "llama3", "tokenizer.model")
    llama3().save(tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == original.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]


def test_late_tokens_of_llama3_are_no_joins():
    ranks = llama3().ranks
    with pytest.raises(ValueError, match="rank 100421, is no join of two earlier tokens"):
        merges(ranks)
    late = {t: r for t, r in ranks.items() if r >= 100_256}
    assert (
        sum(len(encode_piece(token, ranks, below=rank)) != 2 for token, rank in late.items()) == 678
    )


# --- long and bad input


def test_cut_runs_only_cuts_long_runs():
    assert list(cut_runs("")) == [""] and list(cut_runs(corpus()[0])) == [corpus()[0]]
    text = "a" * 60_000 + " " * 25_000 + "b" * 25_001
    assert [len(part) for part in cut_runs(text)] == [25_000, 25_000, 60_000, 1]
    assert "".join(cut_runs(text)) == text


@pytest.mark.parametrize("unit", [" ", "a", "\n", " \n", "1", ".", "é", "\u3000", "ab c"])
def test_very_long_runs_do_not_crash(unit):
    text = "To be " + unit * (1_000_000 // len(unit)) + "b"
    ids = trained().encode(text)
    assert trained().decode_bytes(ids) == text.encode()


def test_ids_do_not_depend_on_the_length_of_a_text_without_long_runs():
    text = (corpus()[0] + corpus()[1] + corpus()[2])[:500_001]
    whole = trained()._core.encode_ordinary(text)
    assert trained().encode(text) == whole


def test_special_text_is_plain_text_unless_allowed():
    tokenizer, text = trained(), "a<|eot_id|>b<|begin_of_text|>"
    plain = tokenizer.encode(text)
    assert max(plain) < 4080 and tokenizer.decode(plain) == text
    eot, bot = tokenizer.special["<|eot_id|>"], tokenizer.bos_id
    some = tokenizer.encode(text, allowed_special={"<|eot_id|>"})
    assert some[:3] == [ord("a"), eot, ord("b")] and bot not in some
    every = tokenizer.encode(text, allowed_special="all", bos=True, eos=True)
    assert every == [bot, ord("a"), eot, ord("b"), bot, tokenizer.eos_id]
    assert (
        tokenizer.encode("<|eot_id|>", allowed_special=["<|eom_id|>"])
        == plain[1 : -len(tokenizer.encode("b<|begin_of_text|>"))]
    )
    with pytest.raises(ValueError, match="no special token '<.eot.>'"):
        tokenizer.encode("x", allowed_special=["<|eot|>"])
    with pytest.raises(TypeError, match="'all' or several names"):
        tokenizer.encode("x", allowed_special="<|eot_id|>")


def test_of_overlapping_special_tokens_the_longest_is_taken():
    tokenizer = Tokenizer(BYTES, ["<a", "<a>", "<a>b"])
    assert tokenizer.encode("<a>b<a><a", allowed_special="all") == [258, 257, 256]
    assert tokenizer.encode("<a>b", allowed_special=["<a"]) == [256, ord(">"), ord("b")]


def test_special_tokens_may_have_ids_of_their_own():
    ranks = {bytes([b]): b + 2 for b in range(256)}
    tokenizer = Tokenizer(ranks, {"<s>": 0, "</s>": 1}, bos="<s>", eos="</s>", stop=["</s>"])
    assert tokenizer.encode("a", bos=True, eos=True) == [0, 99, 1]
    assert tokenizer.stop_ids == (1,) and tokenizer.vocab_size == 258
    assert tokenizer.decode([0, 99, 1]) == "<s>a</s>"


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (["<a>", "<a>"], "'<a>', 2 times"),
        ([""], "not empty"),
        ({"<a>": 97}, "has the id 97, as b'a' has"),
        ({"<a>": 256, "<b>": 256}, "'<b>' has the id 256, as '<a>' has"),
        ({"<a>": 300}, "257 tokens need the ids 0 … 256: no 256"),
    ],
)
def test_special_tokens_that_clash_are_named(special, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(BYTES, special)


def test_missing_bos_is_named():
    with pytest.raises(ValueError, match="no bos token"):
        Tokenizer(BYTES, ()).encode("a", bos=True)
    with pytest.raises(TypeError, match="several names"):
        Vocabulary(BYTES, "<a>")


def test_lone_surrogates_and_bytes_are_refused():
    with pytest.raises(ValueError, match=r"character 3 is the lone surrogate U\+D83D"):
        trained().encode("abc\ud83dx")
    with pytest.raises(TypeError, match="encodes str, not bytes"):
        trained().encode(b"abc")
    assert trained().decode(trained().encode("\U0001f600")) == "\U0001f600"


def test_invalid_utf8_decodes_with_replacement_and_exactly_as_bytes():
    tokenizer = trained()
    assert tokenizer.decode([0xFF, 0x61, 0xC3]) == "\ufffda\ufffd"
    assert tokenizer.decode_bytes([0xFF, 0x61, 0xC3]) == b"\xffa\xc3"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 4096], "id 4096 at position 1 is not in 0 … 4095"),
        ([-1], "id -1 at position 0"),
        ([2**70], "row of integers"),
        ([1.0], "row of integers"),
        ([[1, 2]], "row of integers"),
        ([True], "row of integers"),
    ],
)
def test_bad_ids_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        trained().decode(ids)


def test_ids_may_be_arrays():
    ids = trained().encode("To be, or not to be")
    for row in (np.array(ids, np.uint16), jnp.array(ids), tuple(ids), iter(ids)):
        assert trained().decode(row) == "To be, or not to be"
    assert trained().decode([]) == trained().decode(np.array([])) == ""


# --- the file


def rows() -> list[bytes]:
    return [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)] + [b"YWI= 256"]


DAMAGE = {
    "no rank": (7, b"Bw==", "line 8: b'Bw==' is not 'base64 rank'"),
    "bad base64": (7, b"B*== 7", "line 8: bad base64 b'B[*]=='"),
    "half base64": (7, b"Bw= 7", "line 8: bad base64 b'Bw='"),
    "loose bits": (7, b"Bx== 7", "line 8: bad base64 b'Bx=='"),
    "empty token": (7, b" 7", "line 8: bad base64 b''"),
    "empty line": (7, b"", "line 8: b'' is not 'base64 rank'"),
    "word for rank": (7, b"Bw== seven", "line 8: the rank is b'seven', not a number"),
    "negative rank": (7, b"Bw== -7", "line 8: the rank is b'-7'"),
    "gap": (7, b"Bw== 8", "line 8: rank 8 where 7 should follow"),
    "rank twice": (7, b"Bw== 6", "line 8: rank 6 where 7 should follow"),
    "token twice": (7, b"Bg== 7", r"line 8: token b'.x06' is there already, with rank 6"),
    "not text": (7, b"\xff\xfe\x00", "line 8: "),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_with_its_line(tmp_path, kind):
    at, line, message = DAMAGE[kind]
    lines = rows()
    lines[at] = line
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=f"tokenizer.model, {message}"):
        Tokenizer.load(path, COURSE_SPECIAL)


def test_a_file_cut_short_is_noticed(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(rows()[:200]))
    with pytest.raises(ValueError, match="56 of the 256 single bytes have no token.*0xc8"):
        read_ranks(path)
    path.write_bytes(b"\n".join(rows())[:-5])
    with pytest.raises(ValueError, match="line 257"):
        read_ranks(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="256 of the 256"):
        read_ranks(path)


def test_file_round_trip(tmp_path):
    path = tmp_path / "tokenizer.model"
    trained().save(path)
    again = Tokenizer.load(path, COURSE_SPECIAL)
    assert again.ranks == trained().ranks and again.vocab_size == 4096
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_ranks(path) == trained().ranks
    with pytest.raises(ValueError, match="without a gap"):
        write_ranks(path, {b"a": 3})
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "none.model", ())
    with pytest.raises(TypeError, match="special_tokens"):  # the file cannot say which: we must
        Tokenizer.load(path)


def test_ranks_must_differ():
    with pytest.raises(ValueError, match="b'a' and b'ab' have the same rank 97"):
        check_ranks(BYTES | {b"ab": 97})


# --- windows


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 50))
def test_windows_are_those_of_a_loop(n, length, stride):
    ids = list(range(n))
    looped = [
        (ids[i : i + length], ids[i + 1 : i + length + 1]) for i in range(0, n - length, stride)
    ]
    inputs, targets = sliding_windows(ids, length, stride)
    assert inputs.shape == targets.shape == (count_windows(n, length, stride), length)
    assert [(x, y) for x, y in zip(inputs.tolist(), targets.tolist(), strict=True)] == looped


@pytest.mark.parametrize(("length", "stride"), [(0, 1), (1, 0), (-2, 3)])
def test_windows_reject(length, stride):
    with pytest.raises(ValueError, match="must be at least 1"):
        sliding_windows([1, 2, 3], length, stride)
