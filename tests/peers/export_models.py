"""Step 1 of `make peers`, in the course's environment: write what the peers shall read into a folder.

`python tests/peers/export_models.py FOLDER`: the mini Llama as a Hugging Face folder and as GGUF F32, prompts as ids.
"""

import hashlib
import json
import sys
from pathlib import Path

from llm_from_scratch import formats

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "checkpoints" / "mini-llama3-short"
MINI_PROMPTS = ("ROMEO\n", "To be, or not to be, that is", "KING HENRY\nMy lord of Westmoreland, ")
CHAT_PROMPTS = ("What is the capital of France?", "Name three colours of the rainbow.")
TEXT = "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer"
STRINGS = (TEXT, "naïve café 12345 ½ 😀", "  two  spaces\n\n\ttab", "don't WE'LL I'd", "你好，世界")


def exported(folder: Path) -> dict[str, str]:
    """Write the mini Llama in both formats; the SHA-256 sum of every file."""
    model, tokenizer = formats.load(MINI)
    formats.save_hugging_face(folder / "mini-hf", model, tokenizer)
    formats.save_gguf(folder / "mini-f32.gguf", model, tokenizer)
    files = [*sorted((folder / "mini-hf").iterdir()), folder / "mini-f32.gguf"]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def inputs() -> dict:
    """The prompts as ids, by our tokenizers: of the mini Llama and of SmolLM2."""
    mini = formats.open_checkpoint(MINI).tokenizer
    smollm2 = formats.open_checkpoint(formats.smollm2_path()).tokenizer
    chats = [[{"role": "user", "content": text}] for text in CHAT_PROMPTS]
    return {
        "mini": [mini.encode(text, bos=True) for text in MINI_PROMPTS],
        "smollm2": [smollm2.encode(TEXT), *(formats.chat_ids(smollm2, chat) for chat in chats)],
        "strings": [[text, mini.encode(text), smollm2.encode(text)] for text in STRINGS],
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    found = inputs() | {"sha256": exported(folder), "gguf": str(formats.smollm2_path())}
    (folder / "inputs.json").write_text(json.dumps(found))
