import pytest
import torch
import torch.nn.functional as F
from conftest import assert_compiles_to_one_graph, assert_same_in_bf16, random_dit
from torch import nn

from benchmark import relative_error
from dit import DiT
from dit_block import DiTBlock
from support.checkpoint import BLOCKS
from support.errors import UserError
from variants.modern_block import ModernBlock, SwiGLU, turned

NOISE = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
BATCH = NOISE, torch.tensor([5, 900]), torch.tensor([3, 10])


def modern_dit(**sizes) -> DiT:
    """A random DiT of modern blocks whose attention looks somewhere: with small weights in its norms it would not."""
    model = random_dit(block="modern", **sizes)
    for block in model.blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.weight.data += 1
    return model


def their_turned(x: torch.Tensor, side: int) -> torch.Tensor:
    """diffusers' 2-D rotary embedding of x (B, N, heads, d)."""
    from diffusers.models.embeddings import apply_rotary_emb, get_2d_rotary_pos_embed

    angles = get_2d_rotary_pos_embed(x.shape[-1], ((0, 0), (side, side)), (side, side))
    return apply_rotary_emb(x.transpose(1, 2), angles).transpose(1, 2)


@pytest.mark.parametrize("side, width", [(1, 4), (2, 8), (7, 16), (16, 72)])
def test_rotary_embedding_equals_diffusers(side, width):
    x = torch.randn(2, side**2, 3, width)
    assert relative_error(turned(x), their_turned(x, side)) < 1e-6


def test_attention_sees_relative_positions_alone():
    """One query and one key, put in every place: equal distances, to the right and down, give equal scores."""
    side = 5
    query, key = (turned(part.expand(1, side**2, 1, 16))[0, :, 0] for part in torch.randn(2, 16))
    scores = (query @ key.T).unflatten(1, (side, side)).unflatten(0, (side, side))  # (row, column, row, column)
    shifted = scores[1:, 1:, 1:, 1:]
    assert torch.allclose(scores[:-1, :-1, :-1, :-1], shifted, atol=1e-5)
    assert torch.allclose(scores[:-1, :, :-1, :], scores[1:, :, 1:, :], atol=1e-5)
    here = scores[2, 2]
    assert (here - here[2, 2]).abs().flatten().sort().values[1] > 1e-3  # and different ones different scores


def test_the_gated_mlp_equals_diffusers():
    from diffusers.models.attention import FeedForward

    ours = SwiGLU(48)
    theirs = FeedForward(48, activation_fn="swiglu", inner_dim=128)
    theirs.net[0].proj.load_state_dict(ours.fc1.state_dict())
    theirs.net[2].load_state_dict(ours.fc2.state_dict())
    x = torch.randn(2, 9, 48)
    assert relative_error(ours(x), theirs(x)) < 1e-6


def test_the_block_is_adaln_zero_of_these_parts():
    """Its forward pass, written out with PyTorch's norm and diffusers' rotary embedding."""
    block = modern_dit(depth=1).blocks[0]
    x, c = torch.randn(2, 9, 32), torch.randn(2, 32)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
    norm, norms = nn.RMSNorm(32, eps=1e-6), [nn.RMSNorm(16, eps=1e-6), nn.RMSNorm(16, eps=1e-6)]
    norms[0].load_state_dict(block.attn.norm_q.state_dict())
    norms[1].load_state_dict(block.attn.norm_k.state_dict())
    parts = block.attn.qkv(norm(x) * (1 + scale_1) + shift_1).chunk(3, dim=2)
    query, key, value = (part.unflatten(2, (2, 16)) for part in parts)
    query, key = (their_turned(norm(part), 3) for norm, part in zip(norms, (query, key)))
    seen = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
    expected = x + gate_1 * block.attn.proj(seen.transpose(1, 2).flatten(2))
    expected = expected + gate_2 * block.mlp(norm(expected) * (1 + scale_2) + shift_2)
    assert relative_error(block(x, c), expected) < 1e-6


def test_norms_divide_by_the_root_mean_square_in_each_head():
    block, x = ModernBlock(32, 2), torch.randn(2, 9, 32)
    assert torch.allclose(block.norm1(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), atol=1e-6)
    assert not list(block.norm1.parameters()) and not list(block.norm2.parameters())
    assert block.attn.norm_q.weight.shape == block.attn.norm_k.weight.shape == (16,)


def test_places_turn_and_are_not_added():
    """The model has no position embedding, and yet knows where a patch is."""
    model = modern_dit()
    assert not hasattr(model, "pos_embed") and "pos_embed" not in model.state_dict()
    x, t, y = BATCH
    swapped = x.clone()
    swapped[..., :4, :4], swapped[..., 8:12, 16:20] = x[..., 8:12, 16:20], x[..., :4, :4]
    out, other = model(x, t, y), model(swapped, t, y)
    assert not torch.allclose(out[..., :4, :4], other[..., 8:12, 16:20], rtol=1e-3)


@pytest.mark.parametrize("hidden_size", [96, 128, 192, 384, 768, 1024, 1152])
def test_it_has_the_parameters_of_adaln_zero(hidden_size):
    with torch.device("meta"):
        ours, theirs = (sum(p.numel() for p in kind(hidden_size, 4).parameters()) for kind in (ModernBlock, DiTBlock))
    assert abs(ours / theirs - 1) < 0.005


def test_heads_that_cannot_turn_are_refused():
    with pytest.raises(UserError, match="hidden_size 36 / num_heads 6 is 6; try hidden_size 48"):
        DiT(hidden_size=36, num_heads=6, block=BLOCKS["modern"])


def test_activation_checkpointing_changes_no_gradient():
    plain, saving = (modern_dit(activation_checkpointing=on) for on in (False, True))
    for model in (plain, saving):
        model(*BATCH).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), saving.parameters()))


def test_in_bf16_it_computes_nearly_the_same_and_says_nothing():
    assert_same_in_bf16(modern_dit(), *BATCH)


def test_the_compiler_makes_one_graph_of_a_model():
    assert_compiles_to_one_graph(modern_dit(), *BATCH)
