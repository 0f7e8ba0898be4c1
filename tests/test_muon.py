"""variants/muon.py: PyTorch's Muon, but for the rounding and the order of the products."""

import copy

import pytest
import torch
from torch import nn

from variants.muon import Muon, muon_for, orthogonalized

SHAPES = ((8, 24), (24, 8), (8, 8), (8, 24), (16, 4))


def some_matrices():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def take_steps(optimizer, matrices, count=4):
    for step in range(count):
        torch.manual_seed(step)
        for p in matrices:
            p.grad = torch.randn_like(p)
        optimizer.step()


def in_float32(monkeypatch):
    """PyTorch's iteration without its rounding."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


def test_steps_are_those_of_pytorch_in_float32(monkeypatch):
    ours, theirs = some_matrices(), some_matrices()
    take_steps(Muon(ours, lr=0.03, weight_decay=0.1), ours)
    in_float32(monkeypatch)
    take_steps(torch.optim.Muon(theirs, lr=0.03, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_state_of_pytorchs_muon_goes_on(monkeypatch):
    """A run that an earlier version began has such a state in its checkpoint."""
    in_float32(monkeypatch)
    theirs = some_matrices()
    optimizer = torch.optim.Muon(theirs, lr=0.03, adjust_lr_fn="match_rms_adamw")
    take_steps(optimizer, theirs)
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    going_on = Muon(ours)
    going_on.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(optimizer, theirs)
    take_steps(going_on, ours)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 12, 20), (3, 20, 12), (1, 16, 16)])
def test_singular_values_are_made_about_equal(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor([1e-3, 1.0, 1e3])[: shape[0], None, None]
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    made = orthogonalized(matrices)
    along = (u.mT @ made @ v.mT).diagonal(dim1=1, dim2=2)  # the same singular vectors, with other values
    torch.testing.assert_close(u @ (along[:, :, None] * v), made, rtol=0, atol=1e-4)
    assert 0.6 < along[s > 0.1 * s.amax(1, keepdim=True)].min() and along.max() < 1.3


def test_a_gradient_of_zeros_is_no_division_by_zero():
    assert orthogonalized(torch.zeros(2, 3, 4)).eq(0).all()


def test_matrices_of_the_blocks_are_taken():
    layer = nn.Linear(3, 4)
    assert muon_for(layer, 0.1).param_groups[0]["params"] == [layer.weight]
