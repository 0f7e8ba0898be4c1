import pytest
import torch
from conftest import random_dit
from torch import nn

from diffusion import Diffusion
from support.checkpoint import BLOCKS
from support.speed import count_gflops
from variants.captions import BagOfWords, TextEmbedder
from variants.learned_variance import bits_per_dim

WORDS, NULL = 12, 12  # with the padding, word 0; and the number of the null condition
CAPTIONS = torch.tensor([[1, 5, 7, 3, 0, 0], [4, 0, 0, 0, 0, 0], [11, 2, 2, 9, 8, 1]])


def embedders(length: int = 6) -> tuple[BagOfWords, TextEmbedder]:
    torch.manual_seed(0)
    text = TextEmbedder(WORDS, length, 32, num_heads=2)
    bag = BagOfWords(WORDS, length, 32)
    bag.embedding_table = text.embedding_table
    return bag, text


def normalised(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def test_the_mean_is_a_bag_of_words():
    bag, text = embedders()
    table = text.embedding_table.weight
    for y in CAPTIONS:
        expected = normalised(table[y[y > 0]].mean(0))
        shuffled = torch.cat([y[y > 0].flip(0), y[y == 0]])
        for mean in (bag(y[None]), bag(shuffled[None]), text(y[None]).mean, text(shuffled[None]).mean):
            assert torch.allclose(mean[0], expected, atol=1e-6)
    assert torch.equal(bag(CAPTIONS), text(CAPTIONS).mean)


def test_tokens_tell_the_order_of_the_words():
    tokens = embedders()[1](torch.tensor([[3, 5, 7, 0, 0, 0], [7, 5, 3, 0, 0, 0]])).tokens
    assert not torch.allclose(tokens[0, 1], tokens[1, 1], atol=1e-3)  # the same word at the same place


def test_padding_changes_nothing():
    """What is in the padding's places cannot be seen from the words; nor does it matter how much of it there is."""
    _, text = embedders(length=6)
    _, long = embedders(length=9)
    before = text(CAPTIONS)
    long.load_state_dict(text.state_dict() | {"pos_embed": torch.cat([text.pos_embed, torch.full((3, 32), 1e3)])})
    after = long(nn.functional.pad(CAPTIONS, (0, 3)))
    assert torch.equal(before.mask, CAPTIONS > 0) and torch.equal(after.mask[:, :6], before.mask)
    assert not after.mask[:, 6:].any()
    assert torch.allclose(after.mean, before.mean, atol=1e-6)
    for i, mask in enumerate(before.mask):
        assert torch.allclose(after.tokens[i, :6][mask], before.tokens[i][mask], atol=1e-5)
    with torch.no_grad():
        text.pos_embed[4:] += 1e3
    assert torch.allclose(text(CAPTIONS[:2]).tokens[:, 0], before.tokens[:2, 0], atol=1e-5)


def test_the_empty_caption_is_one_learned_token():
    bag, text = embedders()
    null = torch.full((2, 6), NULL)
    null[1] = 0  # all padding
    words = text(null)
    assert words.mask.tolist() == [[True] + [False] * 5] * 2
    assert torch.equal(words.mean, normalised(text.embedding_table.weight[NULL]).expand(2, 32))
    assert torch.equal(bag(null), words.mean) and torch.equal(words.tokens[0], words.tokens[1])
    assert all(part.isfinite().all() for part in words)


@pytest.mark.parametrize("kind", [0, 1])
def test_gradients_reach_the_words_that_are_there_and_no_others(kind):
    embedder = embedders()[kind]
    for y, there in ((torch.full((1, 6), NULL), {NULL}), (CAPTIONS[:1], {1, 3, 5, 7})):
        embedder.zero_grad()
        out = embedder(y)
        if kind:
            out = torch.cat([out.mean, out.tokens[out.mask]])
        (out * torch.randn_like(out)).sum().backward()
        rows = embedder.embedding_table.weight.grad.abs().sum(1)
        assert set(rows.nonzero().flatten().tolist()) == there


def test_words_tell_each_other_as_in_torchs_attention():
    _, text = embedders()
    theirs = nn.MultiheadAttention(32, 2, batch_first=True)
    state = {"in_proj_weight": text.attn.qkv.weight, "in_proj_bias": text.attn.qkv.bias}
    theirs.load_state_dict(state | {f"out_proj.{name}": value for name, value in text.attn.proj.state_dict().items()})
    x = normalised(text.embedding_table(CAPTIONS) + text.pos_embed)
    expected = x + theirs(x, x, x, key_padding_mask=CAPTIONS == 0)[0]
    mask = CAPTIONS > 0
    assert torch.allclose(text(CAPTIONS).tokens[mask], expected[mask], atol=1e-5)


@pytest.mark.parametrize("block", ["adaLN-Zero", "cross-attention", "joint-attention"])
def test_captions_have_a_bound_and_gflops_as_labels_do(block):
    bag, text = embedders()
    model = random_dit(
        image_size=8, num_classes=WORDS, block=block, y_embedder=text if BLOCKS[block].reads_words else bag
    )
    process, x0 = Diffusion(num_timesteps=4), torch.rand(3, 1, 8, 8) * 2 - 1
    bits = bits_per_dim(process, model, x0, CAPTIONS, torch.Generator().manual_seed(0))
    assert bits.shape == (3,) and bits.isfinite().all()
    assert count_gflops(model) > 0
