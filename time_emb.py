"""The timestep, told to the network: sinusoids of t, then a small MLP.

Each of 128 frequencies w_i = exp(-ln(10000) i / 128) contributes cos(w_i t) and sin(w_i t), as in
"Attention Is All You Need" (Vaswani et al., 2017, section 3.5) and the DiT paper's own code.

t (B,) in [0, 1000)  ->  timestep_embedding (B, 256)  ->  TimestepEmbedder (B, hidden_size)
"""

import math

import torch
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features of t (B,), int or float -> (B, dim) float32, cosines before sines; dim is even."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features -> Linear -> SiLU -> Linear: t (B,) -> (B, hidden_size)."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_embedding(t, self.frequency_embedding_size)
        return self.mlp(features.to(self.mlp[0].weight.dtype))  # of a model in half or double precision too
