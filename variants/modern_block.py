"""The block that followed the paper's: adaLN-Zero around parts that later transformers changed: `--block modern`.

    RMSNorm   the tokens are divided by their root mean square alone, no mean is taken off (Zhang & Sennrich, 2019)
    QK-norm   so are queries and keys, so that no score can grow without bound (Henry et al., 2020; Esser et al., 2024)
    RoPE      places turn queries and keys; nothing is added to the tokens (Su et al., 2021)
    SwiGLU    a gate in the MLP, SiLU(x W) * x V in place of GELU(x W), with equal parameters (Shazeer, 2020)

Lumina (Gao et al., 2024) and JiT (Li & He, 2025) are built so.

x (B, N, D) tokens of a square image, row by row, c (B, D)  ->  (B, N, D)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_block import Attention, DiTBlock, attend
from support.errors import UserError


def turned(x: Tensor) -> Tensor:
    """Rotary position embedding in 2-D: pairs of a head's features turn: x (B, N, heads, d) -> the same, or float32.

    The angle is a token's column, or for the second half of the features its row, times one of d / 4 frequencies. The
    product of a query and a key that are turned depends on the difference of their angles: on how far one is from the
    other, to the right and down, and not on where they are.
    """
    side, quarter = math.isqrt(x.shape[1]), x.shape[-1] // 4
    omega = 10_000.0 ** (-torch.arange(quarter, device=x.device) / quarter)
    angles = torch.arange(side, device=x.device)[:, None] * omega  # (side, d / 4)
    angles = torch.cat([angles.repeat(side, 1), angles.repeat_interleave(side, dim=0)], dim=1)[:, None]  # (N, 1, d / 2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class RotaryAttention(Attention):
    """Self-attention of queries and keys that are normalised in each head, then turned: (B, N, D) -> (B, N, D).

    Raises:
        UserError: for heads that cannot be divided into pairs for rows and as many for columns.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__(hidden_size, num_heads)
        width = hidden_size // num_heads
        if width % 4:
            near = 4 * num_heads * max(1, round(width / 4))
            raise UserError(
                f"block modern turns a head's features in fours; hidden_size {hidden_size} / num_heads {num_heads} is "
                f"{width}; try hidden_size {near}"
            )
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=2)
        weights = self.norm_q.weight  # in float32, where autocast makes bf16 of the tokens
        query, key = (part.unflatten(2, (self.num_heads, -1)).to(weights.dtype) for part in (query, key))
        query, key = turned(self.norm_q(query)), turned(self.norm_k(key))  # (B, N, heads, d)
        query, key = (part.flatten(2).to(value.dtype) for part in (query, key))
        return self.proj(attend(query, key, value, self.num_heads))


class SwiGLU(nn.Module):
    """(x V * SiLU(x W)) U: (B, N, D) -> (B, N, D). Three matrices 8/3 D wide count as many weights as two of 4 D."""

    def __init__(self, hidden_size: int):
        super().__init__()
        width = 8 * round(hidden_size / 3)  # in eights, as fast matrix products like it
        self.fc1 = nn.Linear(hidden_size, 2 * width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=2)
        return self.fc2(value * F.silu(gate))


class ModernBlock(DiTBlock):
    """adaLN-Zero with these four parts: x (B, N, D), c (B, D) -> (B, N, D)."""

    adds_pos_embed = False

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__(hidden_size, num_heads)
        self.norm1 = nn.RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = RotaryAttention(hidden_size, num_heads)
        self.norm2 = nn.RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = SwiGLU(hidden_size)
