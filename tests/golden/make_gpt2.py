"""Write gpt2_tiny/: a random GPT-2 of transformers in the published format, and its logits; and gpt2.json: parameter counts.

Run it in an environment of its own:
    python -m venv /tmp/hf && /tmp/hf/bin/pip install torch==2.13.0 transformers==5.24.0 safetensors
    /tmp/hf/bin/python tests/golden/make_gpt2.py
Norms and biases get random values too: fresh ones are 1 and 0, and a loader that mixed them up would pass.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).parent
SIZES = {
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}

torch.manual_seed(0)
config = GPT2Config(vocab_size=101, n_positions=24, n_embd=24, n_layer=2, n_head=3)
model = GPT2LMHeadModel(config).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        middle = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
        parameter.copy_(middle + 0.2 * torch.randn_like(parameter))
model.save_pretrained(HERE / "gpt2_tiny")
(HERE / "gpt2_tiny" / "generation_config.json").unlink(missing_ok=True)

tokens = torch.randint(101, (17,))  # an odd length
with torch.no_grad():
    logits = model(tokens[None]).logits[0]
    hidden = model.transformer(tokens[None]).last_hidden_state[0]
    every = torch.ones(1, 5, dtype=torch.long)  # or token 0 would count as padding
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(tokens[None, :5], attention_mask=every, **options)
found = {"tokens": tokens, "logits": logits, "hidden": hidden, "greedy": greedy[0]}
save_file({k: v.contiguous() for k, v in found.items()}, HERE / "gpt2_tiny" / "golden.safetensors")

counts = {}
with torch.device("meta"):  # shapes without numbers
    for name, (width, layers, heads) in SIZES.items():
        of = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads))
        counts[name] = sum(p.numel() for p in of.parameters())
(HERE / "gpt2.json").write_text(json.dumps({"parameters": counts}, indent=1) + "\n")
