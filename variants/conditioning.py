"""The three other ways to tell a block t and y (Peebles & Xie, 2023, section 3.2): `--block NAME`.

    in-context        t and y are two more tokens among the image's; the block is a plain transformer's
    cross-attention   a plain block that also asks t and y, a label or the words of a caption, between attention and MLP
    adaLN             adaLN-Zero without gates, and without zeros at the start

x (B, N, D)  ->  (B, N, D), as dit_block.Block; c is what each design's `enter` makes of t and y.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_block import Attention, Block, DiTBlock, Mlp, attend, modulate


class AdaLNBlock(DiTBlock):
    """adaLN: adaLN-Zero without its gates, and without the zeros at the start."""

    num_vectors = 4

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, shift_2, scale_2 = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift_1, scale_1))
        x = x + self.mlp(modulate(self.norm2(x), shift_2, scale_2))
        return x

    @staticmethod
    def zeroed(model: nn.Module) -> list[nn.Linear]:
        return []


class PlainBlock(Block):
    """A transformer block that c does not touch, with norms of its own weights: what the two designs below share."""

    modulates_final_layer = False

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


class InContextBlock(PlainBlock):
    """In-context: t and y are two more tokens, behind the image's; c goes unused."""

    @staticmethod
    def enter(x: Tensor, t_emb: Tensor, y_emb: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x, t_emb.unsqueeze(1), y_emb.unsqueeze(1)], dim=1), t_emb + y_emb  # (B, N + 2, D)


class CrossAttentionBlock(PlainBlock):
    """Cross-attention: the tokens also ask t and y.

    c is these, (B, 2, D), and no mask; or t and a caption's words, (B, 1 + L, D), and a mask (B, 1 + L), True for t and
    where a word is.
    """

    reads_words = True

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__(hidden_size, num_heads)
        self.num_heads = num_heads
        self.norm_cross = nn.LayerNorm(hidden_size, eps=1e-6)
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    @staticmethod
    def enter(x: Tensor, t_emb: Tensor, y_emb: Any) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        if isinstance(y_emb, Tensor):  # of labels
            return x, (torch.stack([t_emb, y_emb], dim=1), None)
        return x, (torch.cat([t_emb.unsqueeze(1), y_emb.tokens], dim=1), F.pad(y_emb.mask, (1, 0), value=True))

    def forward(self, x: Tensor, c: tuple[Tensor, Tensor | None]) -> Tensor:
        asked, mask = c
        x = x + self.attn(self.norm1(x))
        key, value = self.kv(asked).chunk(2, dim=2)
        x = x + self.proj(attend(self.q(self.norm_cross(x)), key, value, self.num_heads, mask))
        x = x + self.mlp(self.norm2(x))
        return x
