import pytest
import torch
from conftest import Captions, assert_compiles_to_one_graph, assert_same_in_bf16, random_dit

from benchmark import relative_error
from config import PAPER_MODELS
from dit import DiT
from variants.captions import Words
from variants.joint_attention import JointAttentionBlock

NOISE = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
BATCH = NOISE, torch.tensor([5, 900]), torch.tensor([[3, 4, 5, 0, 0], [2, 2, 2, 2, 1]])
PAPER_SIZES = [PAPER_MODELS[name] for name in ("DiT-S/2", "DiT-XL/2")]
STREAMS = {  # names of diffusers' for those of the two streams
    "image": ("norm1.linear", ["attn.to_q", "attn.to_k", "attn.to_v"], "attn.to_out.0", "ff"),
    "text": (
        "norm1_context.linear",
        ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "attn.to_add_out",
        "ff_context",
    ),
}


def their_block(hidden_size: int, num_heads: int, last: bool) -> torch.nn.Module:
    from diffusers.models.attention import JointTransformerBlock

    return JointTransformerBlock(hidden_size, num_heads, hidden_size // num_heads, context_pre_only=last)


def to_diffusers(state: dict[str, torch.Tensor], last: bool) -> dict[str, torch.Tensor]:
    """A JointAttentionBlock's state dict, or its gradients by name, under the names of diffusers' block."""
    converted = {}
    for stream, (modulation, qkv, proj, mlp) in STREAMS.items():
        for end in ("weight", "bias"):
            vectors = state[f"{stream}.adaLN_modulation.1.{end}"]
            if last and stream == "text":  # diffusers has the scale before the shift there
                vectors = torch.cat(vectors.chunk(2)[::-1])
            converted[f"{modulation}.{end}"] = vectors
            for name, rows in zip(qkv, state[f"{stream}.qkv.{end}"].chunk(3)):
                converted[f"{name}.{end}"] = rows
            if not (last and stream == "text"):
                converted[f"{proj}.{end}"] = state[f"{stream}.proj.{end}"]
                converted[f"{mlp}.net.0.proj.{end}"] = state[f"{stream}.mlp.fc1.{end}"]
                converted[f"{mlp}.net.2.{end}"] = state[f"{stream}.mlp.fc2.{end}"]
    return converted


def captions_dit(**sizes) -> DiT:
    """A random DiT of joint attention, of captions of 5 words."""
    return random_dit(block="joint-attention", num_classes=7, y_embedder=Captions(7, 32), **sizes)


def random_block(last: bool = False) -> JointAttentionBlock:
    """The first or the last of captions_dit's."""
    return captions_dit().blocks[-1 if last else 0]


@pytest.mark.parametrize("last", [False, True], ids=["middle", "last"])
def test_forward_and_gradients_equal_diffusers(last):
    ours, theirs = random_block(last), their_block(32, 2, last)
    theirs.load_state_dict(to_diffusers(ours.state_dict(), last))
    image, text, c = (torch.randn(2, *size, requires_grad=True) for size in ((9, 32), (5, 32), (32,)))
    out = ours(torch.cat([image, text], dim=1), (c, torch.ones(2, 5, dtype=torch.bool)))
    text_out, image_out = theirs(image, text, c)
    assert relative_error(out[:, :9], image_out) <= 1e-5
    if last:
        assert text_out is None and torch.equal(out[:, 9:], text)  # the words leave as they came
        out, expected = out[:, :9], image_out
    else:
        assert relative_error(out[:, 9:], text_out) <= 1e-5
        expected = torch.cat([image_out, text_out], dim=1)
    direction = torch.randn_like(out)
    inputs = [image, text, c]
    gradients = torch.autograd.grad((out * direction).sum(), [*inputs, *ours.parameters()])
    their_gradients = torch.autograd.grad((expected * direction).sum(), [*inputs, *theirs.parameters()])
    for a, b in zip(gradients[:3], their_gradients[:3]):
        assert relative_error(a, b) <= 1e-5
    names = (name for name, _ in ours.named_parameters())
    converted = to_diffusers(dict(zip(names, gradients[3:])), last)
    for (name, _), expected in zip(theirs.named_parameters(), their_gradients[3:]):
        if last and "add_q_proj" in name:  # what the last words ask, nobody sees
            assert not converted[name].any() and not expected.any(), name
        else:
            assert relative_error(converted[name], expected) <= 1e-5, name


@pytest.mark.parametrize("last", [False, True], ids=["middle", "last"])
def test_what_stands_in_padded_places_changes_no_image_token(last):
    block, x, c = random_block(last), torch.randn(2, 14, 32), torch.randn(2, 32)
    mask = torch.tensor([[True, True, False, False, False], [True, False, True, True, False]])
    other = x.clone()
    other[:, 9:][~mask] = 100 * torch.randn(5, 32)
    out = block(x, (c, mask))
    assert torch.equal(out[:, :9], block(other, (c, mask))[:, :9])
    shown = block(x[:1, :11], (c[:1], mask[:1, :2]))  # as if they were not there
    assert torch.allclose(out[:1, :11], shown, atol=1e-5)
    other[:, 9] = torch.randn(2, 32)  # a word
    assert not torch.allclose(out[:, :9], block(other, (c, mask))[:, :9])


def test_a_model_does_not_see_its_padding_and_sees_every_word():
    model, (x, t, y) = captions_dit(), BATCH
    out = model(x, t, y)
    for place in range(5):
        other = y.clone()
        other[:, place] = 6
        changed = [not torch.allclose(a, b, rtol=1e-3) for a, b in zip(out, model(x, t, other))]
        assert changed == [True, True]
    model.y_embedder.embedding_table.weight.data[0] += 1  # that of the padding
    assert torch.equal(out, model(x, t, y))
    assert not torch.allclose(out, model(x, t + 50, y), rtol=1e-3)


def test_t_and_the_mean_of_the_words_modulate_and_the_words_stand_behind_the_patches():
    x, t_emb, mean, tokens = (torch.randn(2, *size) for size in ((9, 32), (32,), (32,), (5, 32)))
    words = Words(mean, tokens, torch.tensor([[True, True, False, False, False], [True] * 5]))
    entered, (c, mask) = JointAttentionBlock.enter(x, t_emb, words)
    assert torch.equal(entered, torch.cat([x, tokens], dim=1)) and torch.equal(mask, words.mask)
    assert torch.equal(c, t_emb + mean)
    left, c_too = JointAttentionBlock.leave(entered, (c, mask), num_tokens=9)
    assert torch.equal(left, x) and torch.equal(c_too, c)


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity():
    x, t, y = BATCH
    model = DiT(hidden_size=32, depth=3, num_heads=2, block=JointAttentionBlock, y_embedder=Captions(7, 32))
    assert model(x, t, y).shape == x.shape and not model(x, t, y).any()
    tokens, c = torch.randn(2, 14, 32), (torch.randn(2, 32), torch.ones(2, 5, dtype=torch.bool))
    assert all(torch.equal(block(tokens, c), tokens) for block in model.blocks)


def test_the_last_block_has_no_more_of_the_words_than_it_reads():
    first, middle, last = captions_dit(depth=3).blocks
    names = {name for name, _ in middle.named_parameters()}
    assert {name for name, _ in first.named_parameters()} == names
    left_out = {f"text.{name}.{end}" for name in ("proj", "mlp.fc1", "mlp.fc2") for end in ("weight", "bias")}
    assert {name for name, _ in last.named_parameters()} == names - left_out
    assert len(last.text.adaLN_modulation[1].bias) == 2 * 32 and len(middle.text.adaLN_modulation[1].bias) == 6 * 32


@pytest.mark.parametrize("sizes", PAPER_SIZES, ids=["S/2", "XL/2"])
def test_parameters_at_the_papers_sizes_are_those_of_diffusers(sizes):
    with torch.device("meta"):
        settings = dict(image_size=32, in_channels=4, block=JointAttentionBlock, y_embedder=Captions(7, 32))
        model = DiT(**sizes, **settings)
        kinds = [their_block(sizes["hidden_size"], sizes["num_heads"], last) for last in (False, True)]
    middle, last = (sum(p.numel() for p in block.parameters()) for block in kinds)
    assert sum(p.numel() for p in model.blocks.parameters()) == (sizes["depth"] - 1) * middle + last


def test_activation_checkpointing_changes_no_gradient():
    plain, saving = (captions_dit(activation_checkpointing=on) for on in (False, True))
    for model in (plain, saving):
        model(*BATCH).square().mean().backward()
    assert all(
        a.grad is b.grad is None or torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), saving.parameters())
    )


def test_in_bf16_it_computes_nearly_the_same_and_says_nothing():
    assert_same_in_bf16(captions_dit(), *BATCH)


def test_the_compiler_makes_one_graph_of_a_model():
    assert_compiles_to_one_graph(captions_dit(), *BATCH)
