"""Write ngram.json: probabilities of NLTK's n-gram models on a small text, for tests/test_bigram.py.

Run once, in an environment of its own: `pip install nltk==3.10.4 && python tests/golden/make_ngram.py`.
NLTK's padding and vocabulary differ from ours, so it is fed the n-grams themselves: of each document,
for each byte and each order, the byte with the symbols before it, with 256 for "before the document".
Its Kneser-Ney has one discount for all orders and leaves the unigrams undiscounted.
"""

import json
from pathlib import Path

import nltk
from nltk.lm import KneserNeyInterpolated, Lidstone
from nltk.lm.counter import NgramCounter
from nltk.lm.vocabulary import Vocabulary

DOCUMENTS = [
    "to be, or not to be: that is the question:",
    "whether 'tis nobler in the mind to suffer",
    "the slings and arrows of outrageous fortune,",
    "or to take arms against a sea of troubles,",
    "and by opposing end them. to die: to sleep;",
]
QUERIES = [
    "to die, to sleep; to sleep: perchance to dream:",
    "and that is mine, sir.",
    "butter bed",
]
START = 256


def ngrams(document: bytes, order: int) -> list[tuple[int, ...]]:
    padded = [START] * (order - 1) + list(document)
    return [tuple(padded[i : i + order]) for i in range(len(document))]


def model(kind, order: int, parameter: float):
    symbols = sorted({b for d in DOCUMENTS for b in d.encode()})
    counter = NgramCounter()
    for n in range(1, order + 1):
        for document in DOCUMENTS:
            counter.update([ngrams(document.encode(), n)])
    if kind is Lidstone:  # 256 possible symbols; NLTK counts its <UNK> as one of them
        made = Lidstone(parameter, order, vocabulary=Vocabulary(range(255), unk_cutoff=1))
    else:
        made = KneserNeyInterpolated(order, parameter, vocabulary=Vocabulary(symbols, unk_cutoff=1))
    made.counts = counter
    if kind is KneserNeyInterpolated:
        made.estimator.counts = counter
    return made


def probabilities(made, order: int) -> list[list[float]]:
    rows = []
    for query in QUERIES:
        grams = ngrams(query.encode(), order)
        # unmasked: START is a symbol of the context here, and not a word of the vocabulary
        rows.append([made.unmasked_score(g[-1], g[:-1]) for g in grams])
    return rows


if __name__ == "__main__":
    golden = {"nltk": nltk.__version__, "documents": DOCUMENTS, "queries": QUERIES, "models": []}
    for order in range(1, 6):
        for name, kind, parameter in (
            ("add-k", Lidstone, 0.25),
            ("kneser-ney", KneserNeyInterpolated, 0.1),
            ("kneser-ney", KneserNeyInterpolated, 0.75),
        ):
            if order == 1 and kind is KneserNeyInterpolated:
                continue  # NLTK's unigrams alone are continuation counts without a left neighbour
            rows = probabilities(model(kind, order, parameter), order)
            rows = [[float(f"{p:.12g}") for p in row] for row in rows]
            golden["models"].append(
                {"method": name, "order": order, "parameter": parameter, "p": rows}
            )
    path = Path(__file__).with_name("ngram.json")
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(path, path.stat().st_size)
