"""Write scores.json: what sacrebleu makes of small awkward corpora, for the tests of bleu and chrf.

Run it in an environment of its own, with the version that the file then names:
    python -m venv /tmp/sb && /tmp/sb/bin/pip install sacrebleu==2.6.0
    /tmp/sb/bin/python tests/golden/make_scores.py
"""

import json
import random
from importlib.metadata import version
from pathlib import Path

from sacrebleu.metrics import BLEU, CHRF

HERE = Path(__file__).resolve().parent

PAIRS = [  # hypothesis | reference
    "To be, or not to be, that is the Question: | To be, or not to be: that is the question:",
    "Whether 'tis Nobler in the minde to suffer | Whether 'tis nobler in the mind to suffer",
    "The Slings and Arrowes of outragious Fortune, | The slings and arrows of outrageous fortune,",
    "Or to take Armes against a Sea of troubles, | Or to take arms against a sea of troubles,",
    "No more; and by a sleepe, to say we end | No more; and by a sleep to say we end",
    "Is this a Dagger? | Is this a dagger which I see before me,",
    "the the the the the the the | the cat is on the mat",
    "He owes 1,000.50 ducats - 3-4 of them. | He owes 1,000.50 ducats - 3-4 of them.",
    "A 'quoted' [word], {braces} & <tags> &amp; entities &quot;here&quot; | A 'quoted' [word] {braces} & tags",
    "O.K.,no space.after,stops 1.a a.1 | O.K., no space. after, stops 1.a a.1",
    "naïve Cæsar's “cloak” — dearly bought | naive Caesar's cloak, dearly bought",
    "x_y a/b c\\d e@f g#h i$j k%l m^n o*p q+r s=t u~v w`x y|z | x y a/b c d e f",
    "ab | abcdefgh",
    "abcdefgh | ab",
    " | something",
    "something |  ",
    "a | a",
    "ab cd | zz yy",
]


def corpora() -> list[list[list[str]]]:
    """Each [hypothesis, reference] alone, all together, and random words."""
    pairs = [[side.strip() for side in line.split(" | ")] for line in PAIRS if line.strip()]
    rng = random.Random(0)
    words = ["to", "be", "or", "not", "that", "is", "the", "question", ",", ":", "'tis", "end."]
    drawn = [
        [[" ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(2)] for _ in range(n)]
        for n in (1, 2, 3, 5, 8, 40)
        for _ in range(4)
    ]
    return [[pair] for pair in pairs] + [pairs, pairs[:5]] + drawn


def main() -> None:
    rows = []
    for corpus in corpora():
        hypotheses, references = [list(side) for side in zip(*corpus, strict=True)]
        rows.append(
            {
                "hypotheses": hypotheses,
                "references": references,
                "bleu": BLEU().corpus_score(hypotheses, [references]).score,
                "chrf": CHRF().corpus_score(hypotheses, [references]).score,
                "chrf_order3_beta1": CHRF(char_order=3, beta=1)
                .corpus_score(hypotheses, [references])
                .score,
            }
        )
    made_by = f"tests/golden/make_scores.py with sacrebleu {version('sacrebleu')}"
    text = json.dumps({"made_by": made_by, "corpora": rows}, indent=1, ensure_ascii=False)
    (HERE / "scores.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(rows)} corpora")


if __name__ == "__main__":
    main()
