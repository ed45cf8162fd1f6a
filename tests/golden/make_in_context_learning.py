"""Write in_context_learning.safetensors: attention maps of transformers' Llama, and logits without one head.

The model is tests/golden/hf_tiny. Run it in an environment of its own:
    python -m venv /tmp/pt && /tmp/pt/bin/pip install torch==2.13.0 transformers==5.24 safetensors numpy
    /tmp/pt/bin/python tests/golden/make_in_context_learning.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parent
LAYER, HEAD = 1, 2

model = AutoModelForCausalLM.from_pretrained(FOLDER / "hf_tiny", attn_implementation="eager")
model = model.float().eval()
torch.manual_seed(0)
tokens = torch.randint(0, model.config.vocab_size, (2, 12))
tokens[:, 6:] = tokens[:, :6]  # repeated, so that induction has something to score
with torch.no_grad():
    out = model(tokens, output_attentions=True)
    width = model.config.head_dim
    output = model.model.layers[LAYER].self_attn.o_proj.weight
    output[:, HEAD * width : (HEAD + 1) * width] = 0
    without = model(tokens).logits
arrays = {
    "tokens": tokens.int(),
    "maps": torch.stack(out.attentions),
    "logits": out.logits,
    "without": without,
    "head": torch.tensor([LAYER, HEAD], dtype=torch.int32),
}
arrays = {name: array.contiguous() for name, array in arrays.items()}
save_file(arrays, FOLDER / "in_context_learning.safetensors")
