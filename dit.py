"""The Diffusion Transformer (Peebles & Xie, 2023): image -> patches -> transformer blocks -> image.

    tokens = patch embedding of x + position embedding              (B, N, D),  N = (image_size / patch_size)^2
    c      = timestep embedding of t + label embedding of y         (B, D)
    tokens = block(tokens, c)                                       depth times
    output = unpatchify(final_layer(tokens, c))                     (B, C, H, W)

Modules bear the names of the paper's own code, so that its published weights load as they are.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_block import Block, DiTBlock, FinalLayer
from time_emb import TimestepEmbedder


class PatchEmbed(nn.Module):
    """Cut (B, C, H, W) into patches and project each linearly: -> (B, N, D), row by row.

    A convolution whose kernel is as large as its stride is exactly that linear map.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # else each block would copy its tokens in order


class LabelEmbedder(nn.Module):
    """A vector for each class, and one more, the null class, for "no label": y (B,) -> (B, D)."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """Lay patches side by side: x (B, N, p * p * C), each patch in (row, column, channel) order -> (B, C, H, W)."""
    B, N, _ = x.shape
    side = round(N**0.5)
    x = x.view(B, side, side, patch_size, patch_size, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, side, p, side, p)
    return x.reshape(B, -1, side * patch_size, side * patch_size)


def sincos_pos_embed(hidden_size: int, side: int) -> Tensor:
    """Fixed 2-D position embedding of a side x side grid of patches -> (1, N, D) float32.

    Half of the features tell the column, half the row, each as sines, then cosines, of D / 4 frequencies
    (He et al., 2022, "Masked Autoencoders", and the DiT paper's code).
    """
    quarter = hidden_size // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, D / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    columns = axis.repeat(side, 1)
    rows = axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


class DiT(nn.Module):
    """The network of a diffusion or flow on square images.

    Args:
        image_size: height and width in pixels, a multiple of patch_size.
        patch_size: a token is a patch of patch_size x patch_size pixels.
        in_channels: channels of the image (or latent), C.
        hidden_size: width D of a token, a multiple of num_heads and of 4.
        depth: number of blocks.
        num_heads: attention heads of a block.
        num_classes: labels are 0 ... num_classes - 1; num_classes itself is the null class.
        learn_sigma: predict a variance beside each value: 2C channels come out.
        block: the class of the blocks, which also decides how t and y enter (see dit_block.Block).
        activation_checkpointing: keep only the blocks' inputs for the backward pass, and compute the rest again there:
            far less memory, a third more work (Chen et al., 2016).
        y_embedder: what embeds y, where it is not labels: a module with an embedding_table, num_classes its null row.

    Raises:
        ValueError: if the sizes do not divide as said above, naming both.
    """

    def __init__(
        self,
        image_size: int = 28,
        patch_size: int = 4,
        in_channels: int = 1,
        hidden_size: int = 64,
        depth: int = 3,
        num_heads: int = 4,
        num_classes: int = 10,
        learn_sigma: bool = False,
        block: type[Block] = DiTBlock,
        activation_checkpointing: bool = False,
        y_embedder: nn.Module | None = None,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not divisible by patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by num_heads {num_heads} and by 4")
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels
        self.num_tokens = (image_size // patch_size) ** 2
        self.num_classes, self.block, self.activation_checkpointing = num_classes, block, activation_checkpointing
        out_channels = 2 * in_channels if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = y_embedder or LabelEmbedder(num_classes, hidden_size)
        if block.adds_pos_embed:
            pos_embed = sincos_pos_embed(hidden_size, image_size // patch_size)
            self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)
        self.blocks = nn.ModuleList(block.stack(depth, hidden_size, num_heads))
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels, block.modulates_final_layer)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """The whole story of the initialisation, as in the paper's code; draws from torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch embedding is a linear map in a convolution's clothes: initialise it as one.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        # The "Zero" of adaLN-Zero: all gates closed. And, in all designs, an output of exactly 0.
        for linear in (self.final_layer.linear, *self.block.zeroed(self)):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) int or float in [0, 1000), y (B,) int64 -> (B, C, H, W); 2C with learn_sigma."""
        tokens = self.x_embedder(x)  # (B, N, D)
        if self.block.adds_pos_embed:
            tokens = tokens + self.pos_embed
        tokens, c = self.block.enter(tokens, self.t_embedder(t), self.y_embedder(y))
        for block in self.blocks:
            if self.activation_checkpointing:
                tokens = checkpoint(block, tokens, c, use_reentrant=False)
            else:
                tokens = block(tokens, c)
        return unpatchify(self.final_layer(*self.block.leave(tokens, c, self.num_tokens)), self.patch_size)
