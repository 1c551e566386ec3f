"""Random models that compute in float64 throughout, to hold identities to 1e-10."""

import torch
from torch import Tensor, nn

from headscope.models.hf import Model

EXACT = {"atol": 1e-10, "rtol": 1e-10}
SETTINGS = {
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "llama": ("llama", {}),  # shared values, RMSNorm
}


class PreciseRMSNorm(nn.Module):
    """RMSNorm in the precision of its input; transformers' computes in float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def precise(random_model, setting: str, *, n_layers: int = 3, dtype: torch.dtype = torch.float64, **more) -> Model:
    """A random model; in float64, precise through and through."""
    family, changes = SETTINGS[setting]
    model = random_model(family, dtype=dtype, n_layers=n_layers, **changes | more)
    if family == "llama" and dtype == torch.float64:
        for layer in model.module.model.layers:
            layer.input_layernorm = PreciseRMSNorm(layer.input_layernorm)
            layer.post_attention_layernorm = PreciseRMSNorm(layer.post_attention_layernorm)
        return Model(model.module, model.tokenizer, model.bos, model.spec.name)
    return model


def text(model, length: int, seed: int = 0) -> Tensor:
    tokens = torch.randint(1, model.spec.d_vocab, (length,), generator=torch.Generator().manual_seed(seed))
    tokens[0] = model.bos
    return tokens
