"""Step 1 of `make peers`, in the course's environment: write what the peers shall read into a folder.

`python tests/peers/export_models.py FOLDER`: the mini Llamas as Hugging Face folders and as GGUF F32, prompts as ids. The
base is published as such a folder; that very one is read.
"""

import hashlib
import json
import sys
from pathlib import Path

from llm_from_scratch import formats

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "mini": ROOT / "checkpoints" / "mini-llama3-short",
    "base": ROOT / "checkpoints" / "mini-llama3-base",
}
PROMPTS = {
    "mini": ("ROMEO\n", "To be, or not to be, that is", "KING HENRY\nMy lord of Westmoreland, "),
    "base": ("ROMEO\n", "Question: What is 47 + 38?\n", "def add(a, b):\n"),
}
CHAT_PROMPTS = ("What is the capital of France?", "Name three colours of the rainbow.")
TEXT = "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer"
STRINGS = (TEXT, "naïve café 12345 ½ 😀", "  two  spaces\n\n\ttab", "don't WE'LL I'd", "你好，世界")


def export(folder: Path) -> None:
    """Write the models in both formats."""
    folder.mkdir(parents=True, exist_ok=True)
    formats.save_hugging_face(folder / "mini-hf", *formats.load(MODELS["mini"]))
    (folder / "base-hf").unlink(missing_ok=True)
    (folder / "base-hf").symlink_to(MODELS["base"])
    for name, path in MODELS.items():
        formats.save_gguf(folder / f"{name}-f32.gguf", *formats.load(path))


def sums(folder: Path) -> dict[str, str]:
    """The SHA-256 sum of every file that the peers read."""
    saved = sorted(file.name for file in (folder / "mini-hf").iterdir())
    names = [f"{name}-hf/{file}" for name in MODELS for file in saved]
    names += [f"{name}-f32.gguf" for name in MODELS]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def inputs() -> dict:
    """The prompts as ids, by our tokenizers: of the mini Llamas and of SmolLM2."""
    ours = {name: formats.open_checkpoint(path).tokenizer for name, path in MODELS.items()}
    smollm2 = formats.open_checkpoint(formats.smollm2_path()).tokenizer
    chats = [[{"role": "user", "content": text}] for text in CHAT_PROMPTS]
    return {
        **{name: [t.encode(text, bos=True) for text in PROMPTS[name]] for name, t in ours.items()},
        "smollm2": [smollm2.encode(TEXT), *(formats.chat_ids(smollm2, chat) for chat in chats)],
        "strings": STRINGS,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    export(folder)
    found = inputs() | {"sha256": sums(folder), "gguf": str(formats.smollm2_path())}
    (folder / "inputs.json").write_text(json.dumps(found))
