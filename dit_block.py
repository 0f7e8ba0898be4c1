"""The transformer block of DiT, and its conditioning (Peebles & Xie, 2023, Figure 3).

The model's own, adaLN-Zero:

    x = x + gate_1 * Attention(LayerNorm(x) * (1 + scale_1) + shift_1)
    x = x + gate_2 *       MLP(LayerNorm(x) * (1 + scale_2) + shift_2)

The six vectors are a linear function of the conditioning c (timestep + label). That function starts at
zero ("-Zero"), so every gate is 0 and a fresh block is the identity: depth costs nothing at the start.
The three designs that the paper compares it with stand below it, for comparison here too.

x (B, N, D) tokens, c (B, D)  ->  (B, N, D)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift each image's tokens: x (B, N, D), shift and scale (B, D) -> (B, N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V in each head: q (B, N, D), k and v (B, M, D) -> (B, N, D) (Vaswani et al., 2017)."""
    q, k, v = (part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, heads, N, d)
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or q.shape[2] <= 16):
        # Plain matrix products beat the CPU's fused kernel in bf16, by far, and for a few tokens in compiled code.
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, N, M)
        x = weights @ v
    else:
        x = F.scaled_dot_product_attention(q, k, v)
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        return self.proj(attend(q, k, v, self.num_heads))


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

    num_vectors = 6  # that c becomes

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, self.num_vectors * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_1, scale_1))
        x = x + gate_2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_2, scale_2))
        return x


class AdaLNBlock(DiTBlock):
    """adaLN: adaLN-Zero without its gates, and without the zeros at the start."""

    num_vectors = 4

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, shift_2, scale_2 = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift_1, scale_1))
        x = x + self.mlp(modulate(self.norm2(x), shift_2, scale_2))
        return x


class InContextBlock(nn.Module):
    """In-context: a plain transformer block. t and y are two more tokens among x (B, N + 2, D); c goes unused."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class CrossAttentionBlock(InContextBlock):
    """Cross-attention: a plain block that also asks t and y, c (B, 2, D), between attention and MLP."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__(hidden_size, num_heads)
        self.num_heads = num_heads
        self.norm_cross = nn.LayerNorm(hidden_size, eps=1e-6)
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        k, v = self.kv(c).chunk(2, dim=2)
        x = x + self.proj(attend(self.q(self.norm_cross(x)), k, v, self.num_heads))
        x = x + self.mlp(self.norm2(x))
        return x


BLOCKS = {
    "in-context": InContextBlock,
    "cross-attention": CrossAttentionBlock,
    "adaLN": AdaLNBlock,
    "adaLN-Zero": DiTBlock,
}


class FinalLayer(nn.Module):
    """LayerNorm, modulated if adaptive, then each token becomes its patch: (B, N, D), (B, D) -> (B, N, p * p * C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, adaptive: bool = True):
        super().__init__()
        self.norm_final = layer_norm(hidden_size) if adaptive else nn.LayerNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        if adaptive:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.norm_final(x)
        if hasattr(self, "adaLN_modulation"):
            x = modulate(x, *self.adaLN_modulation(c).chunk(2, dim=1))
        return self.linear(x)
