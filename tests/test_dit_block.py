import pytest
import torch
import torch.nn.functional as F
from conftest import random_dit

from dit import DiT
from dit_block import Attention, DiTBlock, attend, modulate


def test_a_fresh_block_is_the_identity():
    block = DiT(hidden_size=32, depth=1, num_heads=2).blocks[0]
    x, c = torch.randn(3, 49, 32), torch.randn(3, 32)
    assert torch.equal(block(x, c), x)
    assert not torch.equal(random_dit().blocks[0](x, c), x)


def test_attention_is_its_formula():
    attention = Attention(32, num_heads=4)
    x = torch.randn(2, 10, 32)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = [
        F.scaled_dot_product_attention(q[..., i : i + 8], k[..., i : i + 8], v[..., i : i + 8]) for i in (0, 8, 16, 24)
    ]
    assert torch.allclose(attention(x), attention.proj(torch.cat(heads, dim=-1)), atol=1e-5)


def test_each_image_is_modulated_by_its_own_conditioning():
    x, shift, scale = torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 4)
    out = modulate(x, shift, scale)
    for image in range(2):
        assert torch.allclose(out[image], x[image] * (1 + scale[image]) + shift[image])


def test_norms_have_no_weights_and_the_papers_epsilon():
    block = DiTBlock(32, 2)
    assert block.norm1.eps == block.norm2.eps == 1e-6
    assert not list(block.norm1.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the fused attention kernel is for GPUs")
def test_fused_and_plain_attention_agree():
    attention = Attention(64, num_heads=4)
    x = torch.randn(2, 49, 64)
    assert torch.allclose(attention(x), attention.cuda()(x.cuda()).cpu(), atol=1e-4)


@pytest.mark.parametrize("num_queries, dtype", [(5, torch.float32), (20, torch.float32), (20, torch.bfloat16)])
def test_masked_keys_are_as_good_as_absent(num_queries, dtype):
    """By the plain matrix products (few queries, bf16) and by the fused kernel."""
    query, key, value = (torch.randn(2, n, 32, dtype=dtype) for n in (num_queries, 7, 7))
    mask = torch.tensor([[True, True, False, True, True, False, False], [True] * 7])
    out = attend(query, key, value, 4, mask)
    shown = mask[0]
    expected = attend(query[:1], key[:1, shown], value[:1, shown], 4)
    assert torch.allclose(out[:1], expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.allclose(out[1:], attend(query[1:], key[1:], value[1:], 4), atol=1e-6)
