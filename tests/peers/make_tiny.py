"""Write tests/golden/meta_tiny, a two-shard checkpoint of Meta's kind, and hf_tiny, a folder by transformers itself.

`python tests/peers/make_tiny.py`, in the peers' environment. One random Llama, its logits by transformers, and its weights
in both layouts: the change of layout here is torch's own reshaping, not ours.
"""

import base64
import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIG = LlamaConfig(
    vocab_size=272,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    rms_norm_eps=1e-5,
    max_position_embeddings=131_072,
    rope_parameters=SCALING | {"rope_theta": 500_000.0},
)


def neighbours(w: torch.Tensor, heads: int) -> torch.Tensor:
    """From halves to Meta's pairs of neighbours, as the inverse of transformers' conversion script."""
    rows, width = w.shape
    return w.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def meta_state(model: LlamaForCausalLM) -> list[dict[str, torch.Tensor]]:
    """Two tensor-parallel shards under Meta's names."""
    state = model.state_dict()
    by_columns = {"attention.wo": "self_attn.o_proj", "feed_forward.w2": "mlp.down_proj"}
    by_rows = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    whole = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    shards: list[dict[str, torch.Tensor]] = [{}, {}]

    def put(name: str, value: torch.Tensor, axis: int | None) -> None:
        parts = (value, value) if axis is None else value.chunk(2, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[f"{name}.weight"] = part.clone()

    put("tok_embeddings", state["model.embed_tokens.weight"], 0)
    put("output", state["lm_head.weight"], 0)
    put("norm", state["model.norm.weight"], None)
    for layer in range(CONFIG.num_hidden_layers):
        for axis, names in ((0, by_rows), (1, by_columns), (None, whole)):
            for meta, hf in names.items():
                value = state[f"model.layers.{layer}.{hf}.weight"]
                heads = {"attention.wq": 4, "attention.wk": 2}.get(meta)
                put(f"layers.{layer}.{meta}", neighbours(value, heads) if heads else value, axis)
    return shards


if __name__ == "__main__":
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    ids = np.random.default_rng(0).integers(0, 256, 40).tolist()
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].numpy()
    answer = {"ids": ids, "logits": rows[::4].astype(float).round(5).tolist()}
    (GOLDEN / "formats_tiny.json").write_text(json.dumps(answer) + "\n")
    model = model.to(torch.bfloat16)  # after the logits: this rounds the rotary frequencies too
    meta, hf = GOLDEN / "meta_tiny", GOLDEN / "hf_tiny"
    meta.mkdir(exist_ok=True)
    for i, shard in enumerate(meta_state(model)):
        torch.save(shard, meta / f"consolidated.{i:02}.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 272}
    params |= {"multiple_of": 32, "norm_eps": 1e-5, "rope_theta": 500_000.0}
    params |= {"use_scaled_rope": True}
    (meta / "params.json").write_text(json.dumps(params))
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256)]
    (meta / "tokenizer.model").write_text("".join(lines))
    model.save_pretrained(hf, max_shard_size="50KB")
