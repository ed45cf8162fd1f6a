"""Make tests/golden/lstm.safetensors: outputs and gradients of torch.nn.LSTM, for test_rnn.py.

In a virtual environment of its own: `pip install torch==2.13.0 safetensors numpy`, then
`python tests/golden/make_lstm.py`. The test run needs neither.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

X, D, T, LAYERS = 5, 7, 12, 2

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
lstm = torch.nn.LSTM(X, D, LAYERS)
for weight in lstm.parameters():
    torch.nn.init.normal_(weight, std=0.7)
xs = torch.randn(T, X)
outputs, (h, c) = lstm(xs)
(outputs**3).sum().backward()
tensors = {"xs": xs, "outputs": outputs, "h": h, "c": c}
for name, weight in lstm.named_parameters():
    tensors |= {name: weight, f"grad.{name}": weight.grad}
kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
save_file(kept, Path(__file__).with_name("lstm.safetensors"))
