"""Make tests/golden/llama_*.safetensors: logits and gradients of transformers' Llama, tiny and random.

In an environment with torch 2.13.0 (CPU) and transformers 5.23.0, neither of which the course needs:

    python tests/golden/make_llama.py

Each file holds, in fp32, the weights under Hugging Face's names, `grad.` + name, the tokens, the
logits, and for packed rows the segments; its metadata holds the transformers config. The loss is the
mean cross-entropy of the next token, within documents.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent
LENGTH = 24
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
CASES = {
    # name: (query heads, key/value heads, head width, scaled, tied, lengths of packed documents)
    "mha": (4, 4, 8, False, False, None),
    "gqa_scaled": (4, 2, 8, True, False, None),
    "mqa_tied": (4, 1, 6, False, True, None),
    "gqa_scaled_tied": (6, 2, 4, True, True, None),
    "packed": (4, 2, 8, True, False, (7, 1, 11, 5)),
}


def build(seed: int, heads: int, kv_heads: int, width: int, scaled: bool, tied: bool):
    """A random model whose norms, scores and gates are far from their initial values."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 1000.0} | (SCALING if scaled else {"rope_type": "default"}),
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 0.35 * noise)
    return config, model


def forward(model, tokens, lengths):
    """Logits with each document of the row alone, positions from 0: the meaning of packing."""
    if lengths is None:
        return model(tokens).logits
    parts = torch.split(tokens, lengths, dim=1)
    return torch.cat([model(part).logits for part in parts], dim=1)


def packed_in_one_call(model, tokens, lengths):
    """The same with transformers' own 4-D mask and positions, as a check of this script."""
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    slots = torch.arange(len(segments))
    seen = (segments[:, None] == segments[None]) & (slots[None] <= slots[:, None])
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    mask = mask.expand(tokens.shape[0], 1, -1, -1)
    positions = positions[None].expand(tokens.shape[0], -1)
    return model(tokens, attention_mask=mask, position_ids=positions).logits


def main() -> None:
    for seed, (name, (heads, kv_heads, width, scaled, tied, lengths)) in enumerate(CASES.items()):
        config, model = build(seed, heads, kv_heads, width, scaled, tied)
        tokens = torch.randint(0, config.vocab_size, (2, LENGTH))
        logits = forward(model, tokens, lengths)
        lengths = lengths or (LENGTH,)
        if len(lengths) > 1:
            torch.testing.assert_close(
                packed_in_one_call(model, tokens, lengths), logits, atol=1e-5, rtol=0
            )
        segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
        inside = segments[:-1] == segments[1:]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1][:, inside].flatten(0, 1), tokens[:, 1:][:, inside].flatten()
        )
        loss.backward()
        tensors = {"tokens": tokens.int(), "logits": logits.detach(), "loss": loss.detach()[None]}
        tensors["segments"] = segments.int().expand_as(tokens).contiguous()
        for key, weight in model.named_parameters():
            tensors[key] = weight.detach()
            tensors["grad." + key] = weight.grad
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        metadata = {"config": json.dumps(config.to_dict())}
        save_file(tensors, FOLDER / f"llama_{name}.safetensors", metadata)
        print(f"{name:16s} loss {loss:.4f}  logits up to {logits.abs().max():.2f}")


if __name__ == "__main__":
    main()
