import pytest
import torch
from conftest import OF_LABELS, Captions, random_dit
from torch import nn

from dit import DiT
from support.checkpoint import BLOCKS


@pytest.mark.parametrize("block", OF_LABELS)
def test_every_design_starts_at_zero_and_uses_the_label_and_the_timestep(block):
    fresh = DiT(hidden_size=32, depth=1, num_heads=2, block=BLOCKS[block])
    x, t, y = torch.randn(1, 1, 28, 28), torch.tensor([5]), torch.tensor([1])
    assert fresh(x, t, y).shape == x.shape and not fresh(x, t, y).any()
    model = random_dit(block=block)
    assert not torch.allclose(model(x, t, y), model(x, t, y + 1), rtol=1e-3)
    assert not torch.allclose(model(x, t, y), model(x, t + 100, y), rtol=1e-3)


@pytest.mark.parametrize("block", OF_LABELS)
def test_without_attention_a_patch_sees_itself_alone(block):
    model = random_dit(block=block)
    for layer in model.blocks:
        layer.attn.proj.weight.data.zero_()
    x, t, y = torch.randn(1, 1, 28, 28), torch.tensor([5]), torch.tensor([1])
    other = x.clone()
    other[..., 4:8, 8:12] += 1
    changed = (model(x, t, y) - model(other, t, y)).abs() > 1e-5
    assert changed[..., 4:8, 8:12].any()
    changed[..., 4:8, 8:12] = False
    assert not changed.any()


def test_blocks_of_gates_alone_start_as_the_identity():
    x, c = torch.randn(2, 9, 32), {"cross-attention": (torch.randn(2, 2, 32), None)}
    for name in OF_LABELS:
        block = DiT(hidden_size=32, depth=1, num_heads=2, block=BLOCKS[name]).blocks[0]
        assert torch.equal(block(x, c.get(name, torch.randn(2, 32))), x) == (name in ("adaLN-Zero", "modern"))
        if name == "adaLN":
            assert block.adaLN_modulation[1].weight.any()


def test_adaln_is_adaln_zero_with_open_gates():
    adaln, zero = (random_dit(block=name, depth=1).blocks[0] for name in ("adaLN", "adaLN-Zero"))
    gateless, gated = adaln.adaLN_modulation[1], zero.adaLN_modulation[1]
    rows = torch.cat([torch.arange(64), torch.arange(96, 160)])  # shift_1, scale_1; shift_2, scale_2
    gated.weight.data.zero_()[rows] = gateless.weight.data
    gated.bias.data.fill_(1)[rows] = gateless.bias.data
    zero.attn, zero.mlp = adaln.attn, adaln.mlp
    x, c = torch.randn(2, 5, 32), torch.randn(2, 32)
    assert torch.allclose(adaln(x, c), zero(x, c), atol=1e-6)


def test_the_two_other_designs_are_pytorchs_transformer_layers():
    """Self-attention, attention to t and y, MLP, each after its norm: nn.TransformerDecoderLayer, Encoder without."""
    x, c = torch.randn(2, 7, 32), torch.randn(2, 2, 32)
    for name, kind in (("in-context", nn.TransformerEncoderLayer), ("cross-attention", nn.TransformerDecoderLayer)):
        ours = random_dit(block=name, depth=1).blocks[0]
        gelu = nn.GELU(approximate="tanh")
        theirs = kind(32, 2, 128, 0.0, gelu, layer_norm_eps=1e-6, batch_first=True, norm_first=True)
        norms = {"norm1": ours.norm1, "norm2": ours.norm2}
        weights = {"self_attn.in_proj_": ours.attn.qkv, "self_attn.out_proj.": ours.attn.proj}
        weights |= {"linear1.": ours.mlp.fc1, "linear2.": ours.mlp.fc2}
        if name == "cross-attention":
            norms = {"norm1": ours.norm1, "norm2": ours.norm_cross, "norm3": ours.norm2}
            weights["multihead_attn.out_proj."] = ours.proj
        weights |= {f"{norm}.": module for norm, module in norms.items()}
        state = {key + end: getattr(module, end) for key, module in weights.items() for end in ("weight", "bias")}
        if name == "cross-attention":
            for end in ("weight", "bias"):
                state[f"multihead_attn.in_proj_{end}"] = torch.cat([getattr(ours.q, end), getattr(ours.kv, end)])
        theirs.load_state_dict(state)
        expected = theirs(x, c) if name == "cross-attention" else theirs(x)
        assert torch.allclose(ours(x, (c, None)), expected, atol=1e-5)


def test_cross_attention_reads_the_words_of_a_caption_and_not_its_padding():
    model = random_dit(block="cross-attention", num_classes=7, y_embedder=Captions(7, 32))
    x, t, y = torch.randn(2, 1, 28, 28), torch.tensor([5, 900]), torch.tensor([[3, 4, 5, 0, 0], [2, 2, 2, 2, 1]])
    out = model(x, t, y)
    for place in range(5):
        other = y.clone()
        other[:, place] = 6
        assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(out, model(x, t, other)))
    model.y_embedder.embedding_table.weight.data[0] += 1  # that of the padding
    assert torch.equal(out, model(x, t, y))
    assert not torch.allclose(out, model(x, t + 50, y), rtol=1e-3)


def test_cross_attention_asks_one_word_as_it_asks_a_label():
    model, captions = (random_dit(block="cross-attention", **more) for more in ({}, dict(y_embedder=Captions(10, 32))))
    captions.load_state_dict(model.state_dict())
    x, t, y = torch.randn(2, 1, 28, 28), torch.tensor([5, 900]), torch.tensor([3, 10])
    assert torch.allclose(captions(x, t, y.unsqueeze(1)), model(x, t, y), atol=1e-6)
