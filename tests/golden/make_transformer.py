"""Write transformer.safetensors: a random encoder layer and decoder layer of PyTorch, post-norm, with inputs and outputs.

Run it in an environment of its own:
    python -m venv /tmp/pt && /tmp/pt/bin/pip install torch==2.13.0 safetensors numpy
    /tmp/pt/bin/python tests/golden/make_transformer.py
The paper's attention has no biases; PyTorch's are set to zero. Norms get random gains and biases.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

D, H, F, S, T = 16, 4, 24, 7, 5
torch.manual_seed(0)
options = {"dim_feedforward": F, "dropout": 0.0, "activation": "relu", "batch_first": True}
encoder = torch.nn.TransformerEncoderLayer(D, H, **options).eval()
decoder = torch.nn.TransformerDecoderLayer(D, H, **options).eval()
for layer in (encoder, decoder):
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if name.endswith(("in_proj_bias", "out_proj.bias")):
            torch.nn.init.zeros_(parameter)

source, tokens = torch.randn(1, S, D), torch.randn(1, T, D)
hidden = torch.zeros(1, S, dtype=torch.bool)
hidden[0, -2:] = True  # the last two are padding
causal = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
with torch.no_grad():
    memory = encoder(source, src_key_padding_mask=hidden)
    out = decoder(tokens, memory, tgt_mask=causal, memory_key_padding_mask=hidden)

arrays = {"source": source[0], "tokens": tokens[0], "memory": memory[0], "out": out[0]}
for prefix, layer in (("encoder", encoder), ("decoder", decoder)):
    arrays |= {f"{prefix}.{n}": p.detach() for n, p in layer.named_parameters()}
arrays = {name: array.contiguous().clone() for name, array in arrays.items()}
save_file(arrays, Path(__file__).with_name("transformer.safetensors"))
