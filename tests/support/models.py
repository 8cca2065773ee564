"""Small models with random weights that show in every token."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def save_model(directory: Path, model_type: str, dtype: Any, sharp: float = 1.0, **sizes: Any) -> Path:
    """Writes a model whose weights are large enough for attention, norms, biases and positions to matter.

    ``sharp`` scales queries and keys.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        draw(name, weight, sharp)
        if model_type == "gemma" and name.endswith("norm.weight"):
            weight.data -= 1.0  # its norms add it again
    model.to(dtype).save_pretrained(directory)
    return directory


def draw(name: str, weight: Any, sharp: float = 1.0) -> None:
    """Fills a weight with random numbers, from torch's own generator on the weight's device."""
    from torch.nn import init

    if weight.ndim == 1:
        init.normal_(weight, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    elif name == "model.embed_tokens.weight":
        init.normal_(weight, std=0.7)
    else:
        init.normal_(weight, std=1.2 * weight.shape[1] ** -0.5)
        if "q_proj" in name or "k_proj" in name:
            weight.data *= sharp


def save_wide(directory: Path, dtype: Any, device: str, **sizes: Any) -> Path:
    """Writes such a LLaMA model of any width: drawn on a device, weight by weight, and never there as a whole."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"], dtype=dtype, **sizes)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    torch.manual_seed(0)
    weights = {}
    for name, tensor in expected.items():
        weight = torch.empty(tensor.shape, device=device)
        draw(name, weight)
        weights[name] = weight.to(dtype).cpu()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    return directory


def save_small_demo(directory: Path, demo_model: Path, **sizes: Any) -> Path:
    """Writes a model of two layers that has the demo model's tokenizer: runs of it read the same datasets."""
    import torch

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    save_model(directory, "llama", torch.float32, vocab_size=49152, **sizes, **ends)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, directory)
    return directory


SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + 3 * place for place in range(8)],
    "original_max_position_embeddings": 32,
}
