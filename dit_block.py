"""The transformer block of DiT, and its conditioning: adaLN-Zero (Peebles & Xie, 2023, Figure 3).

    x = x + gate_1 * Attention(LayerNorm(x) * (1 + scale_1) + shift_1)
    x = x + gate_2 *       MLP(LayerNorm(x) * (1 + scale_2) + shift_2)

The six vectors are Linear(SiLU(c)) of the conditioning c (timestep + label). That linear layer starts at zero
("-Zero"), so every gate is 0 and a fresh block is the identity: a deep network starts as simple as a shallow one.
variants/conditioning.py has the three designs that the paper compares it with.

x (B, N, D) tokens, c (B, D)  ->  (B, N, D)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift each image's tokens: x (B, N, D), shift and scale (B, D) -> (B, N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V in each head: Q (B, N, D), K and V (B, M, D) -> (B, N, D) (Vaswani et al., 2017).

    mask (B, M) is True where a key may be seen; no mask hides none.
    """
    mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, M): the same for all heads and queries
    Q, K, V = (part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in (query, key, value))  # (B, heads, N, d)
    if Q.device.type == "cpu" and (Q.dtype == torch.bfloat16 or Q.shape[2] <= 16):
        # Plain matrix products beat the CPU's fused kernel in bf16, by far, and for a few tokens in compiled code.
        scores = Q * Q.shape[-1] ** -0.5 @ K.transpose(-2, -1)  # (B, heads, N, M)
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        x = scores.softmax(dim=-1) @ V
    else:
        x = F.scaled_dot_product_attention(Q, K, V, mask)
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=2), self.num_heads, mask))


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


class Block(nn.Module):
    """What `DiT` asks of the class of its blocks, beyond the blocks themselves, and the usual answers.

    A block is x (B, N, D), c -> (B, N, D), where c is whatever the design's `enter` makes of t and y.
    """

    adds_pos_embed = True  # to the tokens; else the blocks know of places by themselves
    reads_words = False  # whether y_emb has a caption's words (variants/captions.py), or is one vector as a label's
    modulates_final_layer = True

    @classmethod
    def stack(cls, depth: int, hidden_size: int, num_heads: int) -> list["Block"]:
        """The blocks of a model, first to last."""
        return [cls(hidden_size, num_heads) for _ in range(depth)]

    @staticmethod
    def enter(x: Tensor, t_emb: Tensor, y_emb: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D), embedded t and y (B, D) -> the tokens and the conditioning c of the blocks."""
        return x, t_emb + y_emb

    @staticmethod
    def leave(x: Tensor, c: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """What leaves the last block, and c -> the image's tokens, which stand first, and the final layer's c."""
        return x[:, :num_tokens], c

    @staticmethod
    def zeroed(model: nn.Module) -> list[nn.Linear]:
        """The layers of a DiT of these blocks that start at zero, besides its last."""
        return []


class DiTBlock(Block):
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

    @staticmethod
    def zeroed(model: nn.Module) -> list[nn.Linear]:
        """All that makes gates."""
        return [part.adaLN_modulation[1] for part in (*model.blocks, model.final_layer)]


class FinalLayer(nn.Module):
    """LayerNorm, modulated or not, then each token becomes its patch: (B, N, D), (B, D) -> (B, N, p * p * C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, modulated: bool = True):
        super().__init__()
        self.norm_final = layer_norm(hidden_size) if modulated else nn.LayerNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.norm_final(x)
        if hasattr(self, "adaLN_modulation"):
            x = modulate(x, *self.adaLN_modulation(c).chunk(2, dim=1))
        return self.linear(x)
