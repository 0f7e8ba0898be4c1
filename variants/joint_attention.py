"""MMDiT, the block of Stable Diffusion 3 (Esser et al., 2024, section 4): `--block joint-attention`, for captions.

Image tokens and words are two streams, each with its own modulation, projections and MLP, as an adaLN-Zero block has
them, but one attention goes over both. A patch asks the words and a word asks the patches: unlike in cross-attention,
what a word says changes from block to block. t and the mean of the words modulate both streams.

x (B, N + L, D) is image tokens, then words; c is a vector (B, D) and a mask (B, L), True where a word is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_block import Block, Mlp, attend, layer_norm, modulate


class Stream(nn.Module):
    """What one kind of tokens has of its own: an adaLN-Zero block, cut in two where the attention over both stands.

    Args:
        read_alone: the tokens are asked, but leave as they came: nothing stands behind their attention.
    """

    def __init__(self, hidden_size: int, read_alone: bool = False):
        super().__init__()
        self.num_vectors = 2 if read_alone else 6  # that c becomes
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, self.num_vectors * hidden_size))
        self.norm1 = layer_norm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        if not read_alone:
            self.proj = nn.Linear(hidden_size, hidden_size)
            self.norm2 = layer_norm(hidden_size)
            self.mlp = Mlp(hidden_size)

    def before(self, x: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, M, D), c (B, D) -> queries, keys and values (B, M, 3 D), and the vectors left for `after`."""
        shift_1, scale_1, *vectors = self.adaLN_modulation(c).chunk(self.num_vectors, dim=1)
        return self.qkv(modulate(self.norm1(x), shift_1, scale_1)), vectors

    def after(self, x: Tensor, seen: Tensor, vectors: list[Tensor]) -> Tensor:
        """Tokens and what they have seen, both (B, M, D) -> tokens (B, M, D)."""
        if not vectors:
            return x
        gate_1, shift_2, scale_2, gate_2 = vectors
        x = x + gate_1.unsqueeze(1) * self.proj(seen)
        x = x + gate_2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_2, scale_2))
        return x


class JointAttentionBlock(Block):
    """One MMDiT block; the last of a model only reads the words, for nobody would read what became of them."""

    reads_words = True

    def __init__(self, hidden_size: int, num_heads: int, last: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.image, self.text = Stream(hidden_size), Stream(hidden_size, read_alone=last)

    @classmethod
    def stack(cls, depth: int, hidden_size: int, num_heads: int) -> list[Block]:
        return [cls(hidden_size, num_heads, last=i == depth - 1) for i in range(depth)]

    @staticmethod
    def enter(x: Tensor, t_emb: Tensor, y_emb: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return torch.cat([x, y_emb.tokens], dim=1), (t_emb + y_emb.mean, y_emb.mask)

    def forward(self, x: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        vector, mask = c
        sizes = [x.shape[1] - mask.shape[1], mask.shape[1]]  # N, L
        image, text = x.split(sizes, dim=1)
        image_qkv, image_vectors = self.image.before(image, vector)
        text_qkv, text_vectors = self.text.before(text, vector)
        query, key, value = torch.cat([image_qkv, text_qkv], dim=1).chunk(3, dim=2)
        seen = attend(query, key, value, self.num_heads, F.pad(mask, (sizes[0], 0), value=True))  # (B, N + L, D)
        image_seen, text_seen = seen.split(sizes, dim=1)
        image = self.image.after(image, image_seen, image_vectors)
        text = self.text.after(text, text_seen, text_vectors)
        return torch.cat([image, text], dim=1)

    @staticmethod
    def leave(x: Tensor, c: tuple[Tensor, Tensor], num_tokens: int) -> tuple[Tensor, Tensor]:
        return x[:, :num_tokens], c[0]

    @staticmethod
    def zeroed(model: nn.Module) -> list[nn.Linear]:
        streams = [stream for block in model.blocks for stream in (block.image, block.text)]
        return [part.adaLN_modulation[1] for part in (*streams, model.final_layer)]
