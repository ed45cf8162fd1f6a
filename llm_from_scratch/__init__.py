"""Llama 3 from scratch in JAX: the finished code of the course's chapters.

Written from the cells that say `#| export public` by `make export`.
"""

from importlib import import_module

_PUBLIC = {
    "BM25": "bert",
    "BYTES": "costs",
    "Bert": "bert",
    "BertConfig": "bert",
    "CONFIGS": "llama",
    "COURSE_SPECIAL": "tokenizer",
    "DEVICES": "costs",
    "Device": "costs",
    "GPT2": "gpt2",
    "GPT2Config": "gpt2",
    "GPT2_CONFIGS": "gpt2",
    "Item": "evaluation",
    "LLAMA3_PATTERN": "tokenizer",
    "LLAMA3_SPECIAL": "tokenizer",
    "Llama": "llama",
    "LlamaConfig": "llama",
    "MultiHeadAttention": "attention",
    "NGram": "bigram",
    "PackedBatches": "pretraining",
    "RECIPES": "pretraining",
    "RNNConfig": "rnn",
    "RNNLM": "rnn",
    "RampedBatches": "pretraining",
    "Recipe": "pretraining",
    "Sampler": "generation",
    "Template": "in_context_learning",
    "Tokenizer": "tokenizer",
    "TrainState": "training",
    "Transformer": "transformer",
    "WordPiece": "bert",
    "ablate": "in_context_learning",
    "attention_maps": "in_context_learning",
    "beam_search": "attention",
    "bits_per_byte": "bigram",
    "bleu": "attention",
    "cache_bytes": "costs",
    "chat_ids": "formats",
    "check_gradients": "autodiff",
    "chrf": "attention",
    "confidence_interval": "evaluation",
    "count_parameters": "training",
    "count_params": "llama",
    "critical_batch": "costs",
    "decode_time": "costs",
    "detectable_difference": "evaluation",
    "dynamic_log_probs": "rnn",
    "embed_sentences": "bert",
    "exact_lines": "attention",
    "exact_match": "evaluation",
    "few_shot": "in_context_learning",
    "find_learning_rate": "training",
    "fit": "training",
    "forward_flops": "costs",
    "fuse": "generation",
    "generate": "generation",
    "induction_scores": "in_context_learning",
    "label_log_probs": "in_context_learning",
    "load": "formats",
    "load_bert": "bert",
    "load_gpt2": "gpt2",
    "load_gpt2_tokenizer": "gpt2",
    "load_weights": "training",
    "log_probs": "generation",
    "make_optimizer": "pretraining",
    "mini_llama": "pretraining",
    "minilm_path": "bert",
    "model_bits_per_byte": "pretraining",
    "multiple_choice": "evaluation",
    "next_token_loss": "pretraining",
    "pack": "pretraining",
    "paired_bootstrap": "transformer",
    "pass_at_k": "evaluation",
    "plays": "datasets",
    "prefill_time": "costs",
    "report": "costs",
    "sample": "pretraining",
    "save": "pretraining",
    "save_gguf": "formats",
    "save_gpt2": "gpt2",
    "save_hugging_face": "formats",
    "save_weights": "training",
    "scaled_dot_product_attention": "attention",
    "skip_spikes": "pretraining",
    "sliding_windows": "tokenizer",
    "spikes": "pretraining",
    "stream": "generation",
    "train": "pretraining",
    "train_bpe": "tokenizer",
    "training_bytes": "costs",
    "training_flops": "costs",
    "twin_pairs": "attention",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    """Import a public name from its module when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
