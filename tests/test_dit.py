import pytest
import torch
from conftest import random_dit

from benchmark import diffusers_dit, relative_error
from config import PAPER_MODELS, Config
from dit import DiT, sincos_pos_embed, unpatchify
from support.published import from_diffusers


@pytest.mark.parametrize(
    "sizes",
    [
        dict(image_size=28, patch_size=4, in_channels=1, hidden_size=64, num_heads=4, num_classes=10, depth=3),
        dict(image_size=24, patch_size=8, in_channels=3, hidden_size=96, num_heads=2, num_classes=1000, depth=3),
        dict(image_size=32, in_channels=4, num_classes=1000, learn_sigma=True, **PAPER_MODELS["DiT-S/8"]),
        dict(image_size=32, in_channels=4, num_classes=1000, learn_sigma=True, **PAPER_MODELS["DiT-S/2"]),
        dict(image_size=32, in_channels=4, num_classes=7, learn_sigma=True, **PAPER_MODELS["DiT-XL/2"] | {"depth": 2}),
    ],
    ids=["pixels", "colour", "S/8", "S/2", "XL/2 of two blocks"],
)
def test_forward_and_gradients_equal_diffusers(sizes):
    torch.manual_seed(0)
    theirs, ours = diffusers_dit(Config(**sizes)), DiT(**sizes)
    for block in theirs.transformer_blocks:  # one embedder, as ours, so that its gradients add up
        block.norm1.emb = theirs.transformer_blocks[0].norm1.emb
    ours.load_state_dict(from_diffusers(theirs.state_dict(), sizes["image_size"]))
    x = torch.randn(3, sizes["in_channels"], sizes["image_size"], sizes["image_size"])
    t, y = torch.tensor([0, 10, 999]), torch.tensor([0, 5, sizes["num_classes"]])
    out, out_theirs = ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample
    assert relative_error(out, out_theirs) <= 1e-5
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (out_theirs * direction).sum().backward()
    named = theirs.named_parameters(remove_duplicate=False)
    expected = from_diffusers({name: parameter.grad for name, parameter in named}, sizes["image_size"])
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert relative_error(parameter.grad, expected[name]) <= 1e-5, name


def test_position_embedding_equals_diffusers():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(48, 7, base_size=7, output_type="pt")
    assert (sincos_pos_embed(48, 7)[0] - theirs).abs().max() < 1e-6


SHAPES = [(28, 4, 1), (28, 7, 3), (32, 2, 4), (8, 8, 2), (6, 1, 1), (30, 5, 3)]


@pytest.mark.parametrize("size, patch, channels", SHAPES)
def test_unpatchify_inverts_patchify(size, patch, channels):
    """With an identity for its weights, the patch embedding cuts patches and changes nothing."""
    model = DiT(size, patch, channels, hidden_size=32, depth=1, num_heads=2)
    values = patch * patch * channels
    identity = torch.eye(values).view(values, patch, patch, channels).permute(0, 3, 1, 2)
    model.x_embedder.proj = torch.nn.Conv2d(channels, values, patch, patch, bias=False)
    model.x_embedder.proj.weight.data = identity
    x = torch.randn(2, channels, size, size)
    assert torch.allclose(unpatchify(model.x_embedder(x), patch), x, atol=1e-6)


def test_a_fresh_model_predicts_exactly_zero():
    out = DiT()(torch.randn(2, 1, 28, 28), torch.tensor([0, 999]), torch.tensor([3, 10]))
    assert out.shape == (2, 1, 28, 28) and not out.any()
    assert DiT(learn_sigma=True)(torch.randn(2, 1, 28, 28), torch.tensor([0, 9]), torch.tensor([3, 4])).shape[1] == 2


def test_state_dict_has_the_papers_names():
    names = set(DiT(depth=1).state_dict())
    linear = "t_embedder.mlp.0 t_embedder.mlp.2 x_embedder.proj final_layer.linear final_layer.adaLN_modulation.1"
    linear += " blocks.0.attn.qkv blocks.0.attn.proj blocks.0.mlp.fc1 blocks.0.mlp.fc2 blocks.0.adaLN_modulation.1"
    expected = {f"{name}.{end}" for name in linear.split() for end in ("weight", "bias")}
    assert names == expected | {"pos_embed", "y_embedder.embedding_table.weight"}


def test_labels_timesteps_and_the_null_class_matter():
    model = random_dit()
    x = torch.randn(1, 1, 28, 28)

    def out(t, y):
        return model(x, torch.tensor([t]), torch.tensor([y]))

    assert not torch.allclose(out(5, 1), out(5, 2))
    assert not torch.allclose(out(5, 1), out(5, 10))
    assert not torch.allclose(out(5, 1), out(6, 1))


@pytest.mark.parametrize("sizes", [dict(image_size=28, patch_size=3), dict(hidden_size=30, num_heads=4)])
def test_sizes_that_do_not_divide_are_refused(sizes):
    with pytest.raises(ValueError, match=r"\d+ is not divisible by"):
        DiT(**sizes)


def test_activation_checkpointing_changes_no_gradient():
    """The blocks' activations are computed a second time, from the same inputs: the same bits."""
    x, t, y = torch.randn(2, 1, 28, 28), torch.tensor([5, 900]), torch.tensor([3, 10])
    plain, saving = random_dit(), random_dit(activation_checkpointing=True)
    calls = []
    saving.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        model(x, t, y).square().mean().backward()
    assert len(calls) == 2
    for a, b in zip(plain.parameters(), saving.parameters()):
        assert a.grad is b.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_computes_nearly_the_same(dtype):
    model, x, t, y = random_dit(), torch.randn(2, 1, 28, 28), torch.tensor([5, 900]), torch.tensor([3, 10])
    expected = model(x, t, y)
    out = model.to(dtype)(x.to(dtype), t, y)
    assert out.dtype == dtype and relative_error(out.float(), expected) < 0.02
