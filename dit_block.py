"""The transformer block of DiT, with adaLN-Zero conditioning (Peebles & Xie, 2023, Figure 3).

    x = x + gate_1 * Attention(LayerNorm(x) * (1 + scale_1) + shift_1)
    x = x + gate_2 *       MLP(LayerNorm(x) * (1 + scale_2) + shift_2)

The six vectors are a linear function of the conditioning c (timestep + label). That function starts at
zero ("-Zero"), so every gate is 0 and a fresh block is the identity: depth costs nothing at the start.

x (B, N, D) tokens, c (B, D)  ->  (B, N, D)
"""

import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift each image's tokens: x (B, N, D), shift and scale (B, D) -> (B, N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(d)) V (Vaswani et al., 2017, eq. 1): (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        if x.device.type == "cpu":
            # For a few hundred tokens, plain matrix products beat the CPU's fused kernel, in bf16 by far.
            scale = q.shape[-1] ** -0.5
            weights = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, N, N)
            x = weights @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Linear -> tanh-approximated GELU -> Linear, four times as wide inside: (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def layer_norm(hidden_size: int) -> nn.LayerNorm:
    """LayerNorm without its own scale and shift: the conditioning provides them."""
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


class DiTBlock(nn.Module):
    """One adaLN-Zero block: x (B, N, D), c (B, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_1, scale_1))
        x = x + gate_2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_2, scale_2))
        return x


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then each token becomes its patch of pixels: (B, N, D), (B, D) -> (B, N, p * p * C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
