"""The GPU's path without a GPU: under FakeTensorMode all is "on cuda", and to mix devices is an error as on a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OF_LABELS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from config import PREDICTIONS, SAMPLERS, Config
from dataset import Dataset
from inference import denoise
from support import checkpoint
from support.checkpoint import build_model, build_process
from variants.learned_variance import bits_per_dim

GPU = torch.device("cuda")
SMALL = dict(image_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, batch_size=8)
SMALL |= dict(sample_steps=3, device="cuda", precision="fp32", compile="off")
PROCESSES = [dict(prediction=prediction) for prediction in PREDICTIONS["diffusion"]]
PROCESSES += [dict(learn_sigma=True, prediction="noise", sampler="ddpm", loss="l1", clip_x0=False)]
FLOW = dict(process="flow_matching", sampler="euler")
PROCESSES += [FLOW | dict(prediction=prediction) for prediction in PREDICTIONS["flow_matching"]]
PROCESSES += [dict(process="consistency", sampler="consistency", cfg_scale=1.0)]


class AnyGenerator(torch.Generator):
    """A generator that may be asked for on a GPU that is not there."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


class Watch(TorchDispatchMode):
    """Notes what makes a GPU wait: values read from it (`reads`), and tensors copied between it and the CPU.

    A single number of the CPU's goes to the GPU with the call that uses it, which is no copy.
    """

    def __init__(self):
        super().__init__()
        self.reads, self.copies = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        there = [tensor for tensor in tree_leaves((args, out)) if isinstance(tensor, Tensor)]
        number = func not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        there = {tensor.device.type for tensor in there if tensor.device.type == "cuda" or tensor.ndim or not number}
        if len(there) > 1:
            self.copies.append(func)
        return out


def backward(loss: Tensor) -> None:
    """In place of the backward pass, which needs a driver: a gradient for all that it would reach, all on the GPU."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        assert all(gradient.device.type == "cuda" for gradient in node._input_metadata), node
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)
        nodes += [following for following, _ in node.next_functions]


@pytest.fixture
def gpu(monkeypatch):
    """FakeTensorMode, with stand-ins for what needs a real GPU."""
    watch = Watch()

    def read(tensor):
        watch.reads += tensor.device.type == "cuda"
        return np.zeros(tensor.shape).tolist()

    monkeypatch.setattr(torch, "Generator", AnyGenerator)
    monkeypatch.setattr(Tensor, "item", read)
    monkeypatch.setattr(Tensor, "tolist", read)
    monkeypatch.setattr(FakeTensor, "tolist", read)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(), watch:
        yield watch


def on_gpu(config):
    with GPU:
        return build_model(config)


def some_data(place=GPU):
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8, device=place)
    return Dataset("own", images, torch.zeros(20, dtype=torch.int64, device=GPU), (8, 8))


def walk(gpu, tmp_path, monkeypatch, **changes):
    """train.train on the GPU that is not there, all but its files; returns what it copied."""
    config = Config(**SMALL | dict(out_dir=str(tmp_path / "run"), flip=True) | changes)
    monkeypatch.setattr(train, "choose_device", lambda name: GPU)
    data = some_data()
    if config.caption_length:
        data = data._replace(labels=data.labels[:, None].expand(-1, config.caption_length).contiguous())
    monkeypatch.setattr(train, "prepare", lambda config, device: (config, data, None))
    monkeypatch.setattr(train, "build_model", on_gpu)
    for module in (train, checkpoint):
        monkeypatch.setattr(module, "copy", SimpleNamespace(deepcopy=lambda model: on_gpu(config)))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    for name in ("check_size", "save_run", "save_png"):
        monkeypatch.setattr(train, name, lambda *_, **__: None)
    gpu.reads, gpu.copies = 0, []
    train.train(config)
    return gpu.copies


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_run_of_every_process_stays_on_the_gpu(process, gpu, tmp_path, monkeypatch):
    walk(gpu, tmp_path, monkeypatch, train_steps=2, accumulation_steps=2, **process)


@pytest.mark.parametrize("changes", [*(dict(block=name) for name in OF_LABELS), dict(optimizer="muon")], ids=str)
def test_a_run_of_every_block_and_optimizer_stays_on_the_gpu(changes, gpu, tmp_path, monkeypatch):
    walk(gpu, tmp_path, monkeypatch, train_steps=1, **changes)


@pytest.mark.parametrize("block", ["adaLN-Zero", "cross-attention", "joint-attention"])
def test_a_run_of_captions_stays_on_the_gpu_and_reads_nothing_from_it(block, gpu, tmp_path, monkeypatch):
    captions = dict(block=block, num_classes=3, class_names=("-", "a", "b"), caption_length=4, captions=("a b", "b"))
    few = walk(gpu, tmp_path / "few", monkeypatch, train_steps=2, **captions)
    assert walk(gpu, tmp_path / "more", monkeypatch, train_steps=30, log_every=15, sample_steps=1, **captions) == few
    assert 0 < gpu.reads <= 4


@pytest.mark.parametrize("process", [PROCESSES[0], *PROCESSES[3:5], PROCESSES[6]], ids=str)
def test_more_steps_copy_no_more_to_the_gpu(process, gpu, tmp_path, monkeypatch):
    few = walk(gpu, tmp_path / "few", monkeypatch, train_steps=2, **process)
    assert walk(gpu, tmp_path / "more", monkeypatch, train_steps=6, **process) == few


def test_a_step_reads_nothing_from_the_gpu_but_every_few_steps(gpu, tmp_path, monkeypatch):
    walk(gpu, tmp_path, monkeypatch, train_steps=30, log_every=15, sample_steps=1)
    assert 0 < gpu.reads <= 4


@pytest.mark.parametrize("part", [slice(None), slice(4, 8)], ids=["whole", "a process's"])
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_part_of_a_batch_is_on_the_gpu_wherever_the_images_are(place, part, gpu):
    config = Config(**SMALL, flip=True, accumulation_steps=2)
    parts = train.draw_batch(some_data(place), build_process(config), config, 3, GPU, part)
    B = len(range(8)[part]) // 2
    shapes = [(B, 1, 8, 8), (B,), (B,), (B, 1, 8, 8)]
    for drawn in parts:
        assert [(tensor.shape, tensor.device.type) for tensor in drawn] == [(shape, "cuda") for shape in shapes]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_every_sampler_stays_on_the_gpu_and_reads_nothing_from_it(process, gpu):
    for sampler in SAMPLERS[process.get("process", "diffusion")]:
        for eta in (0.0, 0.5) if sampler == "ddim" else (0.0,):
            config = Config(**SMALL | process | dict(sampler=sampler, eta=eta))
            model, y = on_gpu(config).requires_grad_(False), torch.zeros(4, dtype=torch.int64, device=GPU)
            gpu.reads, gpu.copies = 0, []
            frames = list(denoise(model, config, y, AnyGenerator()))
            assert {(x.shape, x.device.type) for x in frames} == {((4, 1, 8, 8), "cuda")} and len(frames) == 4
            assert not gpu.reads and not gpu.copies


@pytest.mark.parametrize("process", PROCESSES[:4], ids=str)
def test_the_bound_is_computed_on_the_gpu(process, gpu):
    config = Config(**SMALL | process)
    model, x0 = on_gpu(config), torch.zeros(4, 1, 8, 8, device=GPU)
    short = build_process(config)
    short.num_timesteps = 3  # of the thousand
    bits = bits_per_dim(short, model, x0, torch.zeros(4, dtype=torch.int64, device=GPU), AnyGenerator())
    assert (bits.shape, bits.device.type) == ((4,), "cuda")
    assert not gpu.reads and len(gpu.copies) <= 3


@pytest.mark.parametrize("name", ["pos_embed", "y_embedder.embedding_table.weight", "blocks.1.mlp.fc2.bias"])
def test_a_tensor_left_on_the_cpu_is_seen(name, gpu):
    model, x = on_gpu(Config(**SMALL)), torch.zeros(4, 1, 8, 8, device=GPU)
    owner, _, last = name.rpartition(".")
    there = getattr(model.get_submodule(owner), last)
    setattr(model.get_submodule(owner), last, torch.nn.Parameter(torch.zeros(there.shape)))
    with pytest.raises(Exception, match="device"):
        model(x, x[:, 0, 0, 0], x[:, 0, 0, 0].long())


def test_what_a_gpu_waits_for_is_noted(gpu):
    index, here = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    there = here.to(GPU)
    assert there.mul(torch.tensor(2.0)).device.type == "cuda" and len(gpu.copies) == 1  # a number is no copy
    there[index]
    assert len(gpu.copies) == 2
    there.cpu()
    there.sum().item()
    assert len(gpu.copies) == 3 and gpu.reads == 1
