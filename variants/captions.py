"""Captions in the place of labels: a small text encoder that is trained along with the DiT.

A caption y (B, L) is the numbers of its words, 0 behind the last one. The empty caption, "anything", is the null
condition of guidance: one learned token stands in it, so that no mean and no softmax is over nothing. It is written as
num_words at every place, as the null class of labels is num_classes; zeros alone mean the same.

    BagOfWords     y (B, L) -> (B, D), the mean of its words' embeddings, normalised: else a mean of many small vectors
                   would say little beside t, and be learnt slowly. It takes the place of dit.LabelEmbedder for every
                   block, and cannot tell "three left of seven" from "seven left of three".
    TextEmbedder   y (B, L) -> Words: that mean, and the words in their order, for blocks that read them: they have
                   learned positions, and one layer of self-attention tells each the others, as a text encoder does
                   (Vaswani et al., 2017; Radford et al., 2021).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dit_block import Attention, layer_norm


class Words(NamedTuple):
    """A batch of captions, embedded."""

    mean: Tensor  # (B, D), over the words alone, normalised
    tokens: Tensor  # (B, L, D)
    mask: Tensor  # (B, L) bool: True where a word is, False where there is none to be seen


class BagOfWords(nn.Module):
    """The mean of a caption's words' embeddings: y (B, length) -> (B, D); num_words counts the padding, word 0."""

    def __init__(self, num_words: int, length: int, hidden_size: int):
        super().__init__()
        self.length = length
        self.norm = layer_norm(hidden_size)
        self.embedding_table = nn.Embedding(num_words + 1, hidden_size)

    def embed(self, y: Tensor) -> Words:
        """Each word by itself, and their mean."""
        null = self.embedding_table.num_embeddings - 1
        mask = (y > 0) & (y < null)
        tokens = self.embedding_table(y.masked_fill(~mask, null))
        mask[:, 0] = True  # in an empty caption the null token is there
        mean = tokens.mul(mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        return Words(self.norm(mean), tokens, mask)

    def forward(self, y: Tensor) -> Tensor:
        return self.embed(y).mean


class TextEmbedder(BagOfWords):
    """A caption's words in their order, and their mean: y (B, length) -> Words."""

    def __init__(self, num_words: int, length: int, hidden_size: int, num_heads: int):
        super().__init__(num_words, length, hidden_size)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(length, hidden_size))
        self.attn = Attention(hidden_size, num_heads)

    def forward(self, y: Tensor) -> Words:
        mean, tokens, mask = self.embed(y)
        tokens = self.norm(tokens + self.pos_embed)
        return Words(mean, tokens + self.attn(tokens, mask), mask)
