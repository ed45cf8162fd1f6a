"""Write tokenizer.json: what Meta's own tokenizer.py makes of some 200 awkward strings.

Run it in an environment of its own, with the versions that the file then names:
    python -m venv /tmp/meta && /tmp/meta/bin/pip install tiktoken==0.14.0
    /tmp/meta/bin/pip install --no-deps llama-models==0.3.0
    /tmp/meta/bin/python tests/golden/make_tokenizer.py
"""

import hashlib
import json
import random
from importlib.metadata import version
from pathlib import Path

from llama_models.llama3.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent

PLAIN = [  # groups; each text between ¦ is a case, and so is each group as a whole
    "To be, or not to be: that is the question:",
    "  leading spaces¦trailing spaces  ¦ ¦  ¦   ¦\t¦\n¦\r\n¦\n\n\n¦a\n\nb¦a \n b¦a\n \n b¦   \n   ¦x\t\ty¦\x0b\x0c",
    "I'll you're WE'LL we'Ve he'S o'clock 'tis 'Tis rock'n'roll¦don't¦DON'T¦Don’t¦'s 's's ''s¦it'\u017f¦'\u212a",
    "0 1 12 123 1234 12345 123456 1234567¦3.14159¦1,234,567.89¦١٢٣٤¦१२३४५¦²³½Ⅷ¦2+2=4¦999+1=1000¦0x1F¦v1.2.3-rc4",
    "naïve café¦nai\u0308ve cafe\u0301¦Ångström¦A\u030angström¦straße STRASSE¦ﬁnally¦ŒUVRE¦ΑΒΓ αβγ¦Привет, мир",
    "日本語のテキスト¦中文没有空格¦한국어 문장¦हिन्दी में¦ภาษาไทยไม่มีช่องว่าง¦עברית¦العربية¦ქართული¦አማርኛ¦Tiếng Việt",
    "😀¦👩‍👩‍👧‍👦¦👍🏽¦🏳️‍🌈¦🇬🇧🇫🇷¦❤️¦a😀b¦😀😀😀😀¦\u200b¦\ufeffBOM¦a\u200db¦\u00a0\u2003\u3000¦\u2028\u2029¦\x00\x01¦\x7f¦\x85",
    "<|begin_of_text|>¦<|eot_id|>¦<|begin_of_text|><|eot_id|>¦<|start_header_id|>user<|end_header_id|>¦<|eot_id¦",
    "def f(x):\n    return x ** 2\n¦\tif (a==b) {\r\n\t\tc();\r\n\t}¦// --- === ***¦https://a.b/c?d=e&f#g¦a_b_c¦CamelCaseWord",
    "....¦!!!???¦--¦---¦—¦“quoted”¦«guillemets»¦(a)(b)¦[ENTER HAMLET]¦...\n...\n¦ !\n\n¦@user #tag $5 %6 ^7 &8 *9",
    " SolidGoldMagikarp¦\\u0000¦\\n literal¦aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa¦abababababababab¦          x¦\n\n\n\n\n\nx",
    "Et tu, Brute!¦Jam pius extrema veniens¦Arma virumque cano¦quid quos regnorum¦haue loue vpon selfe¦ſhall poſſeſſe",
    "việc¦hiếp¦nhiều¦điều¦ việc¦ hiếp¦ nhiều¦ điều¦jeho¦ jeho¦ватися¦jícím¦ látky¦.:.:¦Coğraf",
]

LONG = [  # (unit, how often): runs that Meta's code cuts at 25,000 characters
    ("a", 25_000),
    ("a", 25_001),
    ("abc", 20_000),
    (" ", 60_001),
    ("\n", 30_000),
    (" \t\n", 17_000),
    ("é😀", 13_000),
    ("word ", 79_999),
    ("x" * 24_999 + " ", 3),
    ("<|eot_id|>", 4_000),
    ("word ", 100_000),  # longer than the 400,000 characters at which Meta's code cuts anyway
]


def fuzzed(n: int) -> list[str]:
    """Random strings of letters, digits, white space, contractions and other scripts."""
    rng = random.Random(7)
    parts = ["'s", "'LL", "'re", " ", "  ", "\n", "\r\n", "\t", "\u00a0", ".", ",\n", "!?", "-"]
    parts += ["the", " The", "THE", "7", "42", "123456", "é", "ß", "я", "語", "ا", "😀", "\u0301"]
    parts += ["<|", "|>", "eot_id", "_", "a", "b", " q", "=", "(", ")\n\n", "\u3000", "०", "\x00"]
    return ["".join(rng.choices(parts, k=rng.randint(1, 16))) for _ in range(n)]


def main() -> None:
    meta = Tokenizer.get_instance()
    cases = [text for group in PLAIN for text in [group, *group.split("¦")]]
    texts = list(dict.fromkeys(["", *cases, *fuzzed(60)]))
    golden = {
        "made by": "tests/golden/make_tokenizer.py",
        "versions": {name: version(name) for name in ("llama-models", "tiktoken")},
        "n_words": meta.n_words,
        "special_tokens": meta.special_tokens,
        "bos_id": meta.bos_id,
        "eos_id": meta.eos_id,
        "stop_tokens": meta.stop_tokens,
        "plain": [[text, meta.encode(text, bos=False, eos=False)] for text in texts],
        "framed": [[t, meta.encode(t, bos=True, eos=True)] for t in texts[:20]],
        "special": [
            [t, meta.encode(t, bos=False, eos=False, allowed_special="all")]
            for t in texts
            if "<|" in t
        ],
        "long": [
            [unit, times, len(ids), hashlib.sha256(json.dumps(ids).encode()).hexdigest()]
            for unit, times in LONG
            for ids in [meta.encode(unit * times, bos=False, eos=False)]
        ],
    }
    path = HERE / "tokenizer.json"
    path.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{len(texts)} texts, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
