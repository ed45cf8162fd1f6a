"""Foreign formats: parity with the libraries' own code, round trips, and files that are damaged or mean harm."""

import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
import safetensors
import tokenizers

from llm_from_scratch import formats, pretraining
from llm_from_scratch.datasets import package_file, plays
from llm_from_scratch.formats import load, save_gguf, save_hugging_face
from llm_from_scratch.llama import CONFIGS, Llama, LlamaConfig, RopeScaling
from llm_from_scratch.tokenizer import COURSE_SPECIAL, LLAMA3_SPECIAL, Tokenizer, read_ranks

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
MINI = ROOT / "checkpoints" / "mini-llama3-short"
PEERS = json.loads((GOLDEN / "formats.json").read_text())
TINY = json.loads((GOLDEN / "formats_tiny.json").read_text())
SHAPE = LlamaConfig(272, 32, 2, 4, 2, 96, 8, rope_scaling=RopeScaling(), max_seq_len=131_072)
sys.path.append(str(ROOT / "tests" / "peers"))


@pytest.fixture(scope="module")
def smollm2():
    return load(formats.smollm2_path())


@pytest.fixture(scope="module")
def mini():
    return load(MINI)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The mini Llamas, exported as the peers saw them."""
    import export_models

    folder = tmp_path_factory.mktemp("exports")
    export_models.export(folder)
    return folder


def byte_tokenizer() -> Tokenizer:
    return Tokenizer({bytes([b]): b for b in range(256)}, COURSE_SPECIAL)


def tiny_model(seed: int = 0, dtype=jnp.float32, **changes) -> Llama:
    config = LlamaConfig(**{**vars(SHAPE), **changes})
    return Llama(config, key=jax.random.key(seed), dtype=dtype)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def hf_folder(folder: Path, model: Llama, **options) -> Path:
    save_hugging_face(folder, model, byte_tokenizer(), **options)
    return folder


def copy_of(name: str, folder: Path) -> Path:
    """A copy of a golden folder, with a tokenizer.json where one is needed."""
    shutil.copytree(GOLDEN / name, folder)
    if name == "hf_tiny":
        fields = formats.hf_tokenizer_fields(byte_tokenizer())
        (folder / "tokenizer.json").write_text(json.dumps(fields))
    return folder


def assert_same(found: Llama, wanted: Llama) -> None:
    """Bit for bit, dtypes and configuration too."""
    assert found.config == wanted.config
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# number formats


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_are_read_as_the_library_reads_them(kind):
    numbers = np.random.default_rng(0).normal(size=(40, 96)).astype(np.float32)
    kind_of = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(numbers, kind_of)
    width, dequantize = formats.BLOCKS[kind]
    ours = dequantize(raw.reshape(-1, width)).reshape(40, 96)
    assert np.array_equal(ours, gguf.quants.dequantize(raw, kind_of))


def test_header_is_read_as_the_library_reads_it(tmp_path, tiny):
    """Names, kinds, shapes, offsets and metadata of a file, against gguf's own reader."""
    path = tmp_path / "tiny.gguf"
    save_gguf(path, tiny, byte_tokenizer(), "Q8_0")
    metadata, tensors = formats.gguf_header(path)
    reader = gguf.GGUFReader(path)
    theirs = {
        t.name: (t.tensor_type.name, tuple(t.shape.tolist())[::-1], int(t.data_offset))
        for t in reader.tensors
    }
    assert {n: (t.kind, t.shape, t.offset) for n, t in tensors.items()} == theirs
    fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    assert metadata == fields


def test_smollm2_header(smollm2):
    """The real file: 272 tensors, of which the library's dequantised numbers are ours, bit for bit."""
    path = formats.smollm2_path()
    _, tensors = formats.gguf_header(path)
    assert len(tensors) == 272
    for name in ("blk.7.ffn_down.weight", "blk.29.attn_v.weight"):
        t = tensors[name]
        raw = np.memmap(path, np.uint8, "r", t.offset, t.nbytes).reshape(t.shape[0], -1)
        wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[t.kind])
        assert np.array_equal(t.rows(0, t.shape[0]), wanted)


# peers: the golden files are made by `make peers`


@pytest.mark.parametrize("name", ["meta_tiny", "hf_tiny"])
def test_files_by_torch_and_transformers(tmp_path, name):
    """Two tensor-parallel shards by torch.save, and a sharded folder by save_pretrained: logits by transformers."""
    model, _ = load(copy_of(name, tmp_path / name))
    assert model.config == SHAPE
    logits = np.asarray(model(jnp.array(TINY["ids"])))[::4]
    assert np.abs(logits - np.array(TINY["logits"])).max() < 1e-4


def test_both_layouts_are_one_model(tmp_path):
    meta, hf = (load(copy_of(name, tmp_path / name))[0] for name in ("meta_tiny", "hf_tiny"))
    assert_same(meta, hf)


def compare(model: Llama, golden: dict) -> float:
    logits = np.asarray(model(jnp.array(golden["ids"])))
    top = np.take_along_axis(logits, np.array(golden["top"]), 1) - np.array(golden["top_logits"])
    columns = logits[:, golden["columns"]] - np.array(golden["column_logits"])
    return max(np.abs(top).max(), np.abs(columns).max())


def test_smollm2_logits(smollm2):
    """transformers read the same GGUF by its own code."""
    assert compare(smollm2[0], PEERS["transformers"]["smollm2"]) < 1e-3


@eqx.filter_jit
def most_likely(model, tokens):
    return model(tokens).argmax(-1)


def greedy_agrees(model: Llama, golden: dict) -> bool:
    """Whether each token of a golden text is our most likely one after those before it: greedy decoding, at once."""
    ids, n = golden["prompt"] + golden["new"], len(golden["prompt"])
    padded = jnp.array(ids + [0] * (96 - len(ids)))
    return np.asarray(most_likely(model, padded))[n - 1 : len(ids) - 1].tolist() == golden["new"]


def test_smollm2_greedy(smollm2):
    """50 tokens, or up to the end of the answer; the first text is 50 long."""
    texts = PEERS["transformers"]["smollm2"]["greedy"]
    assert [len(golden["new"]) for golden in texts] == [50, 8, 50]
    for golden in texts:
        assert greedy_agrees(smollm2[0], golden), golden["smallest_margin"]


@pytest.mark.parametrize(("name", "cpp"), [("mini", "llama.cpp"), ("base", "llama.cpp, base")])
def test_our_models_are_read_alike_by_all(name, cpp):
    """transformers on our folders, llama.cpp on our GGUF files, and we: the same logits, 50 tokens and ids of strings."""
    import export_models

    model, tokenizer = load(export_models.MODELS[name])
    golden, other = PEERS["transformers"][name], PEERS[cpp]
    assert compare(model, golden) < 1e-4 and compare(model, other) < 1e-4
    for a, b in zip(golden["greedy"], other["greedy"], strict=True):
        assert len(a["new"]) == 50
        assert a["new"] == b["new"], a["smallest_margin"]
        assert greedy_agrees(model, a), a["smallest_margin"]
    wanted = [tokenizer.encode(text) for text in export_models.STRINGS]
    assert golden["ids_of_strings"] == wanted == other["ids_of_strings"]


def test_the_peers_read_what_is_written_now(exports):
    """The golden file is of these very files; if one changed, run `make peers WRITE=1`."""
    import export_models

    assert export_models.sums(exports) == PEERS["sha256"]


# tokenizers

ALPHABET = [
    *(" ", "  ", "\n", "\r\n", "\t", "1", "23", "½", "²", "Ⅷ", "٣", "a", "B", "é", "e\u0301"),
    *(
        "ß",
        "'s",
        "'LL",
        "'",
        "’",
        "-",
        "...",
        "你好",
        "😀",
        "👩\u200d👧",
        "\u00a0",
        "\u3000",
        "\u2028",
    ),
    *("\u200b", "\ufeff", "\x04", "\x1d", "\x85", "\U000e0041", "\U00040000", "the", "To be"),
    *("<|im_end|>", "<|", "İ", "ﬀ", "हिन्दी", "السلام", "ไทย", "_", "x=1;"),
]


def hard_strings(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(1, 12))) for _ in range(count)]


def test_smollm2_tokenizer_is_the_librarys(smollm2):
    """Built from the file's own tables with the `tokenizers` library: 10,000 hard strings, special tokens too."""
    metadata, _ = formats.gguf_header(formats.smollm2_path())
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    theirs.add_special_tokens(list(smollm2[1].special))
    for text in hard_strings(10_000):
        wanted = theirs.encode(text).ids
        assert smollm2[1].encode(text, allowed_special="all") == wanted, repr(text)
    assert formats.merge_list(smollm2[1]) == merges
    assert formats.token_table(smollm2[1]) == tokens


def test_exported_tokenizer_is_ours(exports, mini, tmp_path, smollm2):
    """The tokenizer.json that we write, read by the library, gives our ids; and reads back as it was."""
    theirs = tokenizers.Tokenizer.from_file(str(exports / "mini-hf" / "tokenizer.json"))
    for text in hard_strings(3_000):
        assert theirs.encode(text).ids == mini[1].encode(text), repr(text)
    formats.write_json(tmp_path / "tokenizer.json", formats.hf_tokenizer_fields(smollm2[1]))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    back = formats.hf_tokenizer(tmp_path, {"eos_token_id": 2})
    for text in hard_strings(3_000):
        wanted = smollm2[1].encode(text, allowed_special="all")
        assert theirs.encode(text).ids == wanted, repr(text)
        assert back.encode(text, allowed_special="all") == wanted, repr(text)
    assert back.stop_ids == smollm2[1].stop_ids == (2, 0)


def test_llama3_tokenizer_exported(tmp_path):
    """Meta's table of 128,000 ranks, 678 of which no merge makes: read by the library, and back by us."""
    ranks = read_ranks(package_file("llama_models", "llama3", "tokenizer.model"))
    ours = Tokenizer(ranks, LLAMA3_SPECIAL)
    formats.write_json(tmp_path / "tokenizer.json", formats.hf_tokenizer_fields(ours))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    back = formats.hf_tokenizer(tmp_path, {"bos_token_id": 128_000, "eos_token_id": [128_001]})
    assert (back.ranks, back.special) == (ours.ranks, ours.special)
    texts = [*hard_strings(3_000), plays("validation")[0].text[:20_000], ".:.: .:.:.:"]
    for text in texts:
        assert theirs.encode(text).ids == ours.encode(text), repr(text)[:200]


def test_gpt2_pre_tokenizer(tmp_path):
    """A GPT-2 kind of tokenizer.json, trained by the library."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(formats.byte_letters().values())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=letters
    )
    theirs.train_from_iterator(["To be, or not to be, that is the question"] * 9, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = formats.hf_tokenizer(tmp_path, {})
    for text in hard_strings(2_000):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)
    assert ours.stop_ids == (0,)


CHATS = [
    [{"role": "user", "content": "Hello <|im_end|> there"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 2 + 2?\n"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ],
]


@pytest.mark.parametrize("chat", CHATS)
def test_chat_is_what_the_template_renders(smollm2, chat):
    """The file's own template, run by jinja2, which the package never does; a user's <|im_end|> stays text."""
    tokenizer = smollm2[1]
    template = jinja2.Environment().from_string(tokenizer.chat_template)
    text = template.render(messages=chat, add_generation_prompt=True)
    ids = formats.chat_ids(tokenizer, chat)
    assert tokenizer.decode(ids) == text
    frames = 2 * (len(chat) + (chat[0]["role"] != "system")) + 1
    assert sum(id in (1, 2) for id in ids) == frames


def test_llama3_chat():
    """The form of Meta's model card."""
    ids = formats.chat_ids(byte_tokenizer(), CHATS[1])
    assert byte_tokenizer().decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chat_faults():
    with pytest.raises(ValueError, match="neither ChatML nor"):
        formats.chat_ids(Tokenizer({bytes([b]): b for b in range(256)}, ()), CHATS[0])
    with pytest.raises(ValueError, match="keys role and content, not role"):
        formats.chat_ids(byte_tokenizer(), [{"role": "user"}])


# round trips

SHAPES = {
    "grouped, scaled": {},
    "tied, scaled by 32": {"tie_embeddings": True, "rope_scaling": RopeScaling(factor=32.0)},
    "every head its own key": {"n_kv_heads": 4, "rope_scaling": None, "norm_eps": 1e-6},
    "wide heads": {"head_dim": 16, "n_kv_heads": 1, "rope_theta": 10_000.0},
}
every_shape = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)


@every_shape
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_hugging_face_round_trip(tmp_path, changes, dtype):
    """Ours → HF → ours, and HF → ours → HF, bit for bit; also cut into shards."""
    model = tiny_model(dtype=dtype, **changes)
    hf_folder(tmp_path / "a", model)
    back, tokenizer = load(tmp_path / "a", dtype)
    assert_same(back, model)
    save_hugging_face(tmp_path / "b", back, tokenizer)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    hf_folder(tmp_path / "c", model, shard_bytes=10_000)
    assert len(list((tmp_path / "c").glob("model-*.safetensors"))) > 5
    assert_same(load(tmp_path / "c", dtype)[0], model)


def raw_tensors(folder: Path) -> dict[str, tuple]:
    """Dtype, shape and bytes of every tensor, by the safetensors library."""
    files = sorted(folder.glob("*.safetensors"))
    found = [item for file in files for item in safetensors.deserialize(file.read_bytes())]
    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in found}


def test_a_folder_by_transformers_comes_back(tmp_path):
    """HF → ours → HF, where the first is save_pretrained's: every tensor bit for bit."""
    folder = copy_of("hf_tiny", tmp_path / "theirs")
    save_hugging_face(tmp_path / "ours", *load(folder, jnp.bfloat16))
    assert raw_tensors(tmp_path / "ours") == raw_tensors(folder)


@every_shape
def test_gguf_round_trip(tmp_path, changes):
    model, path = tiny_model(**changes), tmp_path / "m.gguf"
    save_gguf(path, model, byte_tokenizer())
    back, tokenizer = load(path)
    assert_same(back, model)
    assert (tokenizer.ranks, tokenizer.special) == (
        byte_tokenizer().ranks,
        byte_tokenizer().special,
    )
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)
    save_gguf(path, model, byte_tokenizer(), "F16")
    half = jax.tree.map(
        lambda x: x if x.ndim == 1 else x.astype(jnp.float16).astype(jnp.float32), model
    )
    assert_same(load(path)[0], half)
    save_gguf(path, model, byte_tokenizer(), "Q8_0")
    for a, b in zip(jax.tree.leaves(load(path)[0]), jax.tree.leaves(model), strict=True):
        worst = (
            0.0 if b.ndim == 1 else np.abs(b).max() / 127
        )  # half a step, and the scale's rounding
        assert np.abs(a - b).max() <= worst


def test_our_own_folder(mini):
    """The same as chapter 11's load, which reads another way."""
    assert_same(mini[0], pretraining.load(MINI)[0])
    assert mini[1].ranks == pretraining.load(MINI)[1].ranks


def test_published_factors():
    """GGUF keeps the scaling as a table of factors; the two published ones are told apart by it."""
    for name in ("llama3.1-8b", "llama3.2-1b", "llama3.2-3b"):
        c = CONFIGS[name]
        plain = formats.rope_frequencies(c.head_dim, c.rope_theta)
        slowed = formats.rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        found = formats.scaling_of_factors(plain / slowed, c.head_dim, c.rope_theta)
        assert found == c.rope_scaling
    with pytest.raises(ValueError, match="none of the published"):
        formats.scaling_of_factors(np.ones(32), 64, 500_000.0)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_published_shapes_through_meta_and_hugging_face(name):
    """Each published size from the fields of Meta's params.json, and to config.json and back."""
    c = CONFIGS[name]
    assert formats.hf_config(formats.hf_config_fields(c, jnp.bfloat16)) == c
    multiplier = {4096: 1.3, 8192: 1.3, 16384: 1.2, 2048: 1.5, 3072: 1.0}[c.dim]
    multiple = {2048: 256, 3072: 256, 4096: 1024}.get(c.dim, 4096)
    fields = {"dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": 8}
    fields |= {"vocab_size": 128_256, "ffn_dim_multiplier": multiplier, "multiple_of": multiple}
    fields |= {"norm_eps": 1e-5, "rope_theta": 500_000.0}
    fields |= {"use_scaled_rope": c.rope_scaling is not None}
    assert formats.meta_config(fields, c.tie_embeddings) == c


# memory

MEASURE = """
import resource, sys
import jax, jax.numpy as jnp
from llm_from_scratch import formats
checkpoint = formats.open_checkpoint(sys.argv[1])
jnp.zeros(8).block_until_ready()
def high():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
def now():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
before = now()
model = formats.read_model(checkpoint, sys.argv[2])
print(high() - before, sum(x.nbytes for x in jax.tree.leaves(model)), max(x.nbytes for x in jax.tree.leaves(model)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's process status")
@pytest.mark.parametrize("kind", ["gguf", "hugging face"])
def test_peak_memory_is_the_model_and_one_tensor(tmp_path, smollm2, kind):
    path = formats.smollm2_path()
    if kind == "hugging face":
        path = tmp_path / "hf"
        save_hugging_face(path, *smollm2, dtype=jnp.bfloat16)
    command = [sys.executable, "-c", MEASURE, str(path), "float32"]
    given_back = os.environ | {"GLIBC_TUNABLES": ""}  # or what was freed would count as held
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=given_back)
    peak, model, largest = map(int, done.stdout.split())
    assert 500e6 < model < 540e6 and 100e6 < largest < 120e6
    assert peak < model + largest


# files that are damaged or mean harm


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "harmed"))


def with_pickle(folder: Path, payload: bytes) -> Path:
    """meta_tiny with another data.pkl in its first shard."""
    copy_of("meta_tiny", folder)
    shard = folder / "consolidated.00.pth"
    with zipfile.ZipFile(shard) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(shard, "w") as new:
        for name, data in members.items():
            new.writestr(name, payload if name.endswith("data.pkl") else data)
    return folder


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_means_harm(tmp_path, protocol):
    """Unpickled, it writes a file; read by us, it is refused and named."""
    flag = tmp_path / "harm"
    payload = pickle.dumps({"tok_embeddings.weight": Harm(flag)}, protocol=protocol)
    pickle.loads(payload)
    assert flag.read_text() == "harmed"
    flag.unlink()
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth.*(refused|instruction)"):
        load(with_pickle(tmp_path / "m", payload))
    assert not flag.exists()


HARMS = {
    "system": b"cos\nsystem\n(S'touch harm'\ntR.",
    "eval": b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
    "reduce of a storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a huge memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "no end": b"\x80\x02}",
    "not a dict": b"\x80\x02K\x05.",
    "no tensor": b"\x80\x02}X\x01\x00\x00\x00aK\x05s.",
    "empty": b"",
}


@pytest.mark.parametrize("payload", HARMS.values(), ids=HARMS)
def test_other_pickles(tmp_path, payload):
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth|params\.json: .* 0 tensors"):
        load(with_pickle(tmp_path / "m", payload))


def rewrite(path: Path, change) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def header_of(path: Path, change) -> None:
    """Change the JSON header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


Q = "model.layers.1.self_attn.q_proj.weight"
HF_FAULTS = {
    "not an architecture": (
        lambda d: rewrite(d / "config.json", lambda f: f.update(model_type="gpt_neox")),
        r"config\.json.*the architecture is 'gpt_neox'; read here is 'llama'",
    ),
    "biases": (
        lambda d: rewrite(d / "config.json", lambda f: f.update(attention_bias=True)),
        r"config\.json.*attention_bias is True",
    ),
    "another scaling": (
        lambda d: rewrite(d / "config.json", lambda f: f["rope_scaling"].update(rope_type="yarn")),
        r"config\.json.*rotary scaling 'yarn'",
    ),
    "no config field": (
        lambda d: rewrite(d / "config.json", lambda f: f.pop("hidden_size")),
        r"config\.json.*hidden_size",
    ),
    "a wrong shape": (
        lambda d: rewrite(d / "config.json", lambda f: f.update(intermediate_size=64)),
        r"mlp\.gate_proj\.weight has the shape \(96, 32\), the configuration asks for \(64, 32\)",
    ),
    "too many layers": (
        lambda d: rewrite(d / "config.json", lambda f: f.update(num_hidden_layers=10**12)),
        r"config\.json.*1,000,000,000,000 layers",
    ),
    "one layer less": (
        lambda d: rewrite(d / "config.json", lambda f: f.update(num_hidden_layers=1)),
        r"model\.layers\.1\.\S+ is not expected",
    ),
    "a small vocabulary": (
        lambda d: rewrite(d / "tokenizer.json", lambda f: f["model"]["vocab"].pop("a")),
        r"tokenizer\.json.*the ids of its 271 tokens are not",
    ),
    "another tokenizer": (
        lambda d: rewrite(d / "tokenizer.json", lambda f: f["model"].update(type="Unigram")),
        r"tokenizer\.json.*type BPE",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "cut off": (
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:-1]
        ),
        r"model\.safetensors: \S+ of shape \(\d+, 32\) should lie at bytes .* cut off or damaged",
    ),
    "nothing but zeros": (
        lambda d: (d / "model.safetensors").write_bytes(bytes(100)),
        r"model\.safetensors (is damaged|can't be read)",
    ),
    "integers": (
        lambda d: header_of(d / "model.safetensors", lambda h: h[Q].update(dtype="I32")),
        rf"model\.safetensors: {re.escape(Q)} has the dtype I32; read here are F64, F32",
    ),
    "a tensor renamed": (
        lambda d: header_of(d / "model.safetensors", lambda h: h.update(odd=h.pop(Q))),
        rf"{re.escape(Q)} is missing; odd is not expected",
    ),
    "a tensor reshaped": (
        lambda d: header_of(d / "model.safetensors", lambda h: h[Q].update(shape=[16, 64])),
        rf"{re.escape(Q)} has the shape \(16, 64\), the configuration asks for \(32, 32\)",
    ),
    "three axes": (
        lambda d: header_of(d / "model.safetensors", lambda h: h[Q].update(shape=[4, 8, 32])),
        rf"{re.escape(Q)} has the shape \(4, 8, 32\); a Llama's tensors have 1 or 2 axes",
    ),
}


@pytest.mark.parametrize(("damage", "message"), HF_FAULTS.values(), ids=HF_FAULTS)
def test_hugging_face_faults(tmp_path, tiny, damage, message):
    damage(hf_folder(tmp_path / "m", tiny))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(tmp_path / "m")
    assert str(tmp_path) in str(caught.value)


def test_shard_faults(tmp_path):
    folder = copy_of("hf_tiny", tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    rewrite(index, lambda f: f["weight_map"].update(odd="../../elsewhere.safetensors"))
    with pytest.raises(ValueError, match=r"index\.json.*elsewhere.* is no name of a safetensors"):
        load(folder)
    rewrite(index, lambda f: f["weight_map"].update(odd="model-00003-of-00002.safetensors"))
    with pytest.raises(FileNotFoundError, match="model-00003-of-00002.safetensors is missing"):
        load(folder)
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder / "b.safetensors")
    rewrite(index, lambda f: f["weight_map"].update(odd="b.safetensors"))
    with pytest.raises(ValueError, match=r"is in .*b\.safetensors and in .*00002-of-00002"):
        load(folder)


META_FAULTS = {
    "the last shard missing": (
        lambda d: (d / "consolidated.01.pth").unlink(),
        ValueError,
        r"tok_embeddings\.weight has the shape \(136, 32\), the configuration asks for \(272, 32\)",
    ),
    "the first shard missing": (
        lambda d: (d / "consolidated.00.pth").unlink(),
        FileNotFoundError,
        r"consolidated\.00\.pth is missing",
    ),
    "one shard twice as often": (
        lambda d: shutil.copy(d / "consolidated.01.pth", d / "consolidated.02.pth"),
        ValueError,
        r"shape \(136, 32\) in each of 3 shards, the configuration asks for \(272, 32\)",
    ),
    "cut off": (
        lambda d: (d / "consolidated.01.pth").write_bytes(
            (d / "consolidated.01.pth").read_bytes()[:30_000]
        ),
        ValueError,
        r"consolidated\.01\.pth (is damaged|can't be read)",
    ),
    "no parameters": (
        lambda d: (d / "params.json").unlink(),
        FileNotFoundError,
        r"params\.json is missing",
    ),
    "no tokenizer": (
        lambda d: (d / "tokenizer.model").unlink(),
        FileNotFoundError,
        r"tokenizer\.model is missing",
    ),
    "a wrong width": (
        lambda d: rewrite(d / "params.json", lambda f: f.update(multiple_of=64)),
        ValueError,
        r"w1\.weight has the shape \(48, 32\) in each of 2 shards, the configuration asks for \(128, 32\)",
    ),
}


@pytest.mark.parametrize(("damage", "kind", "message"), META_FAULTS.values(), ids=META_FAULTS)
def test_meta_faults(tmp_path, damage, kind, message):
    damage(copy_of("meta_tiny", tmp_path / "m"))
    with pytest.raises(kind, match=message) as caught:
        load(tmp_path / "m")
    assert str(tmp_path) in str(caught.value)


def test_tied_meta(tmp_path):
    """A checkpoint without output.weight is tied; so is one whose output is the embedding's storage."""
    folder = copy_of("meta_tiny", tmp_path / "m")
    files = [formats.pth_header(path) for path in sorted(folder.glob("*.pth"))]
    assert all("output.weight" in tensors for tensors in files)
    assert load(folder)[0].head is not None
    for shard in folder.glob("*.pth"):
        with zipfile.ZipFile(shard) as old:
            members = {name: old.read(name) for name in old.namelist()}
        (pickled,) = [name for name in members if name.endswith("data.pkl")]
        # storage 1 is output.weight's: let it name storage 0
        members[pickled] = members[pickled].replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000")
        with zipfile.ZipFile(shard, "w") as new:
            for name, data in members.items():
                new.writestr(name, data)
    model, _ = load(folder)
    assert model.head is None and model.config.tie_embeddings


def patch(data: bytes, name: bytes, skip: int, value: int) -> bytes:
    """One byte changed, `skip` bytes after a name."""
    at = data.index(name) + len(name) + skip
    return data[:at] + bytes([value]) + data[at + 1 :]


GGUF_FAULTS = {
    "another magic": (lambda b: b"GGML" + b[4:], "begins with b'GGML'"),
    "big-endian version": (lambda b: b[:4] + b"\0\0\0\3" + b[8:], "GGUF version 50331648"),
    "too many tensors": (lambda b: b[:8] + b"\xff" * 8 + b[16:], "more than the file holds"),
    "cut off": (lambda b: b[:-2_000], r"should lie at bytes .* cut off or damaged"),
    "cut off in the header": (lambda b: b[:500], "(is damaged|can't be read)"),
    "empty": (lambda b: b"", "only 0 bytes"),
    "another architecture": (lambda b: b.replace(b"llama", b"qwen2", 2), "'qwen2'"),
    "another tokenizer": (lambda b: b.replace(b"llama-bpe", b"falcon-hi", 1), "'falcon-hi'"),
    "a tensor renamed": (lambda b: b.replace(b"blk.1.attn_q", b"blk.1.attn_x"), "attn_q.weight is miss"),
    "a kind that is not read": (
        lambda b: patch(b, b"blk.0.attn_q.weight", 20, 12),
        r"blk\.0\.attn_q\.weight has the dtype GGML type 12",
    ),
    "another shape": (
        lambda b: patch(b, b"blk.0.attn_q.weight", 4, 16),
        r"blk\.0\.attn_q\.weight has the shape \(32, 16\), the configuration asks for \(32, 32\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), GGUF_FAULTS.values(), ids=GGUF_FAULTS)
def test_gguf_faults(tmp_path, tiny, damage, message):
    path = tmp_path / "m.gguf"
    save_gguf(path, tiny, byte_tokenizer())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_what_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no config\.json and no consolidated"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question")
    with pytest.raises(ValueError, match=r"a\.txt (is damaged|can't be read): begins with b'To b'"):
        load(tmp_path / "a.txt")
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json"):
        load(tmp_path)


def test_own_folder_faults(tmp_path):
    shutil.copytree(MINI, tmp_path / "m")
    rewrite(tmp_path / "m" / "config.json", lambda f: f.update(hidden_dim=640))
    with pytest.raises(ValueError, match=r"w_gate has the shape \(704, 256\), .* \(640, 256\)"):
        load(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model is missing"):
        load(tmp_path / "m")


def test_writing_faults(tmp_path, tiny, monkeypatch):
    """A file is whole or not there: nothing is left of a write that failed."""
    with pytest.raises(ValueError, match="kind must be F32, F16 or Q8_0, got 'Q4_0'"):
        save_gguf(tmp_path / "m.gguf", tiny, byte_tokenizer(), "Q4_0")
    small = Tokenizer({bytes([b]): b for b in range(256)}, COURSE_SPECIAL[:4])
    with pytest.raises(ValueError, match="the tokenizer has 260 ids, the model 272 rows"):
        save_gguf(tmp_path / "m.gguf", tiny, small)
    odd = tiny_model(rope_scaling=RopeScaling(factor=3.0))
    with pytest.raises(ValueError, match="none of the published"):
        save_gguf(tmp_path / "m.gguf", odd, byte_tokenizer())
    monkeypatch.setattr(formats, "neighbour_order", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_gguf(tmp_path / "m.gguf", tiny, byte_tokenizer())
    assert list(tmp_path.iterdir()) == []


# fuzz


def mutated(data: bytes, header: int, draw: random.Random) -> bytes:
    """One to four small changes in the first `header` bytes, or a cut."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(header, len(changed)))
        match draw.randrange(6):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                changed[at] = draw.choice((0, 1, 9, 127, 255, ord("9"), ord("-"), ord('"')))
            case 2:
                changed[at : at + 8] = b"\xff" * draw.choice((4, 8))
            case 3:
                del changed[at : at + draw.randint(1, 9)]
            case 4:
                changed[at:at] = changed[at : at + draw.randint(1, 30)]
            case 5 if draw.random() < 0.2:
                del changed[at + 1 :]
    return bytes(changed)


def fuzz(path: Path, whole: Path, data: bytes, header: int, count: int, seed: int) -> list[int]:
    """Open `count` mutations of a file; how many were refused, and how many opened and were read."""
    draw, refused, read = random.Random(seed), 0, 0
    for _ in range(count):
        path.write_bytes(mutated(data, header, draw))
        try:
            checkpoint = formats.open_checkpoint(whole)
            if read < 20:
                formats.read_model(checkpoint)
            read += 1
        except (ValueError, FileNotFoundError) as error:
            assert str(path.parent) in str(error)
            refused += 1
    path.write_bytes(data)
    return [refused, read]


def test_ten_thousand_mutated_headers(tmp_path, tiny):
    """Only ValueError and FileNotFoundError come out, each naming a file."""
    small = tiny_model(n_layers=1)
    hf = hf_folder(tmp_path / "hf", small)
    save_gguf(tmp_path / "m.gguf", small, byte_tokenizer())
    meta = copy_of("meta_tiny", tmp_path / "meta")
    data = (hf / "model.safetensors").read_bytes()
    targets = [
        (hf / "model.safetensors", hf, 8 + int.from_bytes(data[:8], "little"), 3_000),
        (hf / "config.json", hf, None, 1_000),
        (hf / "tokenizer.json", hf, None, 500),
        (tmp_path / "m.gguf", tmp_path / "m.gguf", 14_000, 3_000),
        (meta / "consolidated.00.pth", meta, 3_000, 1_500),
        (meta / "consolidated.01.pth", meta, None, 500),
        (meta / "params.json", meta, None, 500),
    ]
    assert sum(count for *_, count in targets) == 10_000
    for seed, (path, whole, header, count) in enumerate(targets):
        data = path.read_bytes()
        refused, _ = fuzz(path, whole, data, header or len(data), count, seed)
        assert refused > count // 20, path
        formats.open_checkpoint(whole)


# the command


def test_convert(tmp_path, capsys, mini):
    formats.main(["convert", str(MINI), str(tmp_path / "hf")])
    formats.main(["convert", str(tmp_path / "hf"), str(tmp_path / "m.gguf")])
    formats.main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "h2"), "--dtype", "bfloat16"])
    assert "m.gguf (gguf) → h2 (bfloat16)" in capsys.readouterr().out
    assert_same(load(tmp_path / "h2")[0], mini[0])
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("hf", "h2")]
    assert sizes[0] == sizes[1] < 9e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nowhere", "a.gguf"], "nowhere does not exist"),
        (["convert", str(MINI), "folder", "--dtype", "q8_0"], r"a target that ends in \.gguf"),
        (["chat", str(GOLDEN)], r"no config\.json"),
    ],
)
def test_command_faults(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        formats.main(arguments)
    assert stopped.value.code == 1
    found = capsys.readouterr().err
    assert re.search(message, found) and found.count("\n") == 1


def test_generate_and_chat(capsys, monkeypatch):
    """Both speak; a chat goes on, line by line."""
    pytest.importorskip("llm_from_scratch.generation")
    formats.main(["generate", str(MINI), "ROMEO", "--max-tokens", "4"])
    assert capsys.readouterr().out.startswith("ROMEO")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\nAnd you?\n"))
    formats.main(["chat", str(MINI), "--max-tokens", "4", "--temperature", "0"])
    assert capsys.readouterr().out.count("\n") >= 2


def test_cost(capsys):
    pytest.importorskip("llm_from_scratch.costs")
    formats.main(["cost", "llama3.1-8b", "--device", "h100"])
    assert "8,030,261,248 parameters" in capsys.readouterr().out
    formats.main(["cost", "smollm2", "--context", "2048"])
    assert "134,515,008 parameters" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        formats.main(["cost", "smollm2", "--device", "abacus"])
    assert "abacus" in capsys.readouterr().err


def pickled(*steps: bytes) -> bytes:
    return b"\x80\x02" + b"".join(steps) + b"."


@pytest.mark.parametrize(
    "program",
    [
        pickled(b"}", b")" + b"\x85" * 300_000, b"N", b"s"),  # a nest as a key
        pickled(b"}", b")" + b"q\x00h\x00\x86" * 40, b"N", b"s"),  # 2^40 empty tuples as a key
        pickled(b")" + b"\x85" * 300_000, b")", b"R"),  # a nest that is called
    ],
)
def test_nested_pickles_are_refused_at_once(program):
    """Hashing or printing such values ends Python or takes forever."""
    with pytest.raises(ValueError, match="no string|refused"):
        formats.PickleMachine().run(program)


def test_saving_replaces_the_model_that_was_there(tmp_path, tiny):
    model, tokenizer = tiny, byte_tokenizer()
    other = jax.tree.map(lambda x: x + 1, model)
    formats.save_hugging_face(tmp_path, model, tokenizer, shard_bytes=20_000)
    formats.save_hugging_face(tmp_path, other, tokenizer)
    assert eqx.tree_equal(formats.load(tmp_path)[0], other)
    with pytest.raises(ValueError, match="dtype must be float16.*int8"):
        formats.save_hugging_face(tmp_path, model, tokenizer, dtype=jnp.int8)
    assert eqx.tree_equal(formats.load(tmp_path)[0], other)


def test_tensors_are_not_copied(tmp_path, tiny):
    """`aligned` gives memory that JAX takes over."""
    raw = formats.aligned((64, 64), np.dtype(np.float32))
    assert jax.device_put(raw).unsafe_buffer_pointer() == raw.ctypes.data


@pytest.mark.parametrize("field", ["rope.freq_base", "attention.layer_norm_rms_epsilon"])
def test_numbers_that_are_none_are_refused(field):
    """A NaN in a GGUF header is named, not computed with."""
    whole = {
        "general.architecture": "llama",
        "llama.embedding_length": 32,
        "llama.attention.head_count": 4,
        "llama.rope.freq_base": 1e4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    with pytest.raises(ValueError, match=f"{field}.*finite"):
        formats.gguf_config(whole | {f"llama.{field}": float("nan")}, {})
