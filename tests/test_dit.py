import pytest
import torch
from conftest import random_dit
from diffusers import DiTTransformer2DModel

from dit import DiT, sincos_pos_embed, unpatchify


def to_diffusers(model: DiT, depth: int, num_heads: int) -> DiTTransformer2DModel:
    """The same network in diffusers, the same weights in it."""
    hidden_size = model.pos_embed.shape[-1]
    state = model.state_dict()
    theirs = DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=hidden_size // num_heads,
        in_channels=model.in_channels,
        out_channels=state["final_layer.linear.weight"].shape[0] // model.patch_size**2,
        num_layers=depth,
        sample_size=model.image_size,
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
        norm_eps=1e-6,
    ).eval()
    renamed = {
        "pos_embed.proj.weight": state["x_embedder.proj.weight"],
        "pos_embed.proj.bias": state["x_embedder.proj.bias"],
        "proj_out_1.weight": state["final_layer.adaLN_modulation.1.weight"],
        "proj_out_1.bias": state["final_layer.adaLN_modulation.1.bias"],
        "proj_out_2.weight": state["final_layer.linear.weight"],
        "proj_out_2.bias": state["final_layer.linear.bias"],
    }
    for i in range(depth):
        ours, block = f"blocks.{i}.", f"transformer_blocks.{i}."
        for end in ("weight", "bias"):
            for name, part in zip("qkv", state[f"{ours}attn.qkv.{end}"].chunk(3)):
                renamed[f"{block}attn1.to_{name}.{end}"] = part
            renamed[f"{block}attn1.to_out.0.{end}"] = state[f"{ours}attn.proj.{end}"]
            renamed[f"{block}ff.net.0.proj.{end}"] = state[f"{ours}mlp.fc1.{end}"]
            renamed[f"{block}ff.net.2.{end}"] = state[f"{ours}mlp.fc2.{end}"]
            renamed[f"{block}norm1.linear.{end}"] = state[f"{ours}adaLN_modulation.1.{end}"]
            for theirs_n, ours_n in ((1, 0), (2, 2)):  # diffusers has the t and y embedders in every block
                name = f"{block}norm1.emb.timestep_embedder.linear_{theirs_n}.{end}"
                renamed[name] = state[f"t_embedder.mlp.{ours_n}.{end}"]
        renamed[f"{block}norm1.emb.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
    theirs.load_state_dict(renamed, strict=True)
    theirs.pos_embed.pos_embed.data.copy_(state["pos_embed"])
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as the paper's own code
    return theirs


@pytest.mark.parametrize(
    "sizes",
    [
        dict(image_size=28, patch_size=4, in_channels=1, hidden_size=64, num_heads=4, num_classes=10),
        dict(image_size=16, patch_size=2, in_channels=4, hidden_size=48, num_heads=3, num_classes=7, learn_sigma=True),
        dict(image_size=24, patch_size=8, in_channels=3, hidden_size=96, num_heads=2, num_classes=1000),
    ],
)
def test_forward_and_gradients_equal_diffusers(sizes):
    ours = random_dit(depth=3, **sizes)
    theirs = to_diffusers(ours, depth=3, num_heads=sizes["num_heads"])
    x = torch.randn(5, sizes["in_channels"], sizes["image_size"], sizes["image_size"])
    t = torch.tensor([0, 1, 10, 500, 999])
    y = torch.arange(5) % sizes["num_classes"]
    out, out_theirs = ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample

    def relative_error(a, b):
        return ((a - b).norm() / b.norm()).item()

    assert relative_error(out, out_theirs) <= 1e-5
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (out_theirs * direction).sum().backward()
    pairs = [(ours.x_embedder.proj.weight, theirs.pos_embed.proj.weight)]
    pairs += [(ours.final_layer.linear.weight, theirs.proj_out_2.weight)]
    pairs += [(ours.final_layer.adaLN_modulation[1].weight, theirs.proj_out_1.weight)]
    for block, block_theirs in zip(ours.blocks, theirs.transformer_blocks):
        attention = block_theirs.attn1
        pairs += [(block.mlp.fc1.weight, block_theirs.ff.net[0].proj.weight)]
        pairs += [(block.mlp.fc2.bias, block_theirs.ff.net[2].bias)]
        pairs += [(block.attn.proj.weight, attention.to_out[0].weight)]
        pairs += [(block.adaLN_modulation[1].weight, block_theirs.norm1.linear.weight)]
        theirs_qkv = torch.cat([attention.to_q.weight.grad, attention.to_k.weight.grad, attention.to_v.weight.grad])
        assert relative_error(block.attn.qkv.weight.grad, theirs_qkv) <= 1e-5
    for a, b in pairs:
        assert relative_error(a.grad, b.grad) <= 1e-5
    embedders = [block.norm1.emb for block in theirs.transformer_blocks]  # shared in ours: gradients add up
    for a, name in (
        (ours.t_embedder.mlp[0].weight, "timestep_embedder.linear_1.weight"),
        (ours.t_embedder.mlp[2].weight, "timestep_embedder.linear_2.weight"),
        (ours.y_embedder.embedding_table.weight, "class_embedder.embedding_table.weight"),
    ):
        total = sum(e.get_parameter(name).grad for e in embedders[1:])
        total = total + embedders[0].get_parameter(name).grad
        assert relative_error(a.grad, total) <= 1e-5


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


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match="block 'post-norm' is not one of in-context, cross-attention, adaLN"):
        DiT(block="post-norm")


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
