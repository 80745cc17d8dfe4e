"""Tiny random decoders of transformers, one of each architecture; and an adapter whose values are not 0 any more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 96
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Class of transformers without its ending -> what its configuration says otherwise than _SIZES
ARCHITECTURES: dict[str, dict] = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Qwen3Moe": {"head_dim": 8, **_EXPERTS},
    "Qwen3Next": {
        "head_dim": 8, **_EXPERTS, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "Mistral": {}, "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}, "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 16}, "Gemma3": {"head_dim": 8, "sliding_window": 16},
    "GPTNeoX": {}, "GPT2": _GPT, "GPTJ": {**_GPT, "rotary_dim": 4}, "Phi": {}, "Phi3": {}, "Olmo2": {}, "Falcon": {},
    "Bloom": {}, "SmolLM3": {}, "Starcoder2": {}, "Granite": {}, "Cohere": {}, "StableLm": {},
}  # fmt: skip
# Without an MLP module of its own in each layer.
WITHOUT_MLP: dict[str, dict] = {
    "OPT": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 16},
}


def decoder(name: str = "Llama", seed: int = 0, **changes: object) -> nn.Module:
    import transformers

    changed = {**ARCHITECTURES, **WITHOUT_MLP}[name]
    sizes = changed if "n_embd" in changed else {**_SIZES, **changed}
    if name == "Bloom":
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**sizes | changes)
    torch.manual_seed(seed)
    return getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()


def token_ids(seed: int = 1, length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def fill(model: nn.Module, seed: int = 2) -> None:
    """Random values of a size that shows, for every parameter token that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "value_tokens" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
