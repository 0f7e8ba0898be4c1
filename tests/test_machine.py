import os
import signal

import pytest
import torch

from config import Config, preset
from support import machine
from support.checkpoint import build_model, check_size
from support.errors import UserError
from support.machine import check_memory, compile_network, deferred_signals

CPU = torch.device("cpu")
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture
def usual():
    """Handlers that note which signal came, in the place of those that would end the tests."""
    noted = []
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in STOPS}
    yield noted
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_is_kept_for_the_loop_and_a_second_acts_at_once(number, usual):
    with deferred_signals() as received:
        os.kill(os.getpid(), number)
        assert (received, usual) == ([number], [])
        os.kill(os.getpid(), number)
        assert (received, usual) == ([number], [number])
    os.kill(os.getpid(), number)
    assert usual == [number, number]  # as before


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_that_is_ignored_stays_ignored(number, usual):
    """As SIGHUP under nohup, and SIGINT in a background job."""
    signal.signal(number, signal.SIG_IGN)
    with deferred_signals() as received:
        os.kill(os.getpid(), number)
    assert received == [] and signal.getsignal(number) == signal.SIG_IGN


def give_memory(monkeypatch, size: float) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(size) // 4096}
    monkeypatch.setattr(machine.os, "sysconf", sizes.__getitem__)


def test_memory_is_told_before_the_work(monkeypatch):
    give_memory(monkeypatch, 8e9)
    check_memory(7.9e9, "this", "do that")
    with pytest.raises(UserError, match="^this would take 9 GB of memory, and there are 8; do that$"):
        check_memory(9e9, "this", "do that")
    monkeypatch.delattr(machine.os, "sysconf")  # Windows does not tell
    check_memory(9e9, "this", "do that")


FITTING = [(name, {"image_size": 28}) for name in ("digits", "flow", "long", "classic")]
FITTING += [("DiT-XL/2", {"batch_size": 1, "in_channels": 4, "num_classes": 1000})]


@pytest.mark.parametrize("name, changes", FITTING)
def test_what_fits_is_not_refused(name, changes, monkeypatch):
    give_memory(monkeypatch, 24e9 if name.startswith("DiT") else 1e9)
    check_size(preset(name, **changes), CPU)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(hidden_size=65_536, num_heads=16, depth=100),
        dict(hidden_size=65_536, num_heads=16),
        dict(batch_size=2**20),
        dict(image_size=16_384, patch_size=16_384),
        dict(image_size=16_384, patch_size=1),
        dict(num_classes=10**7, hidden_size=4096),
        dict(in_channels=16_384, patch_size=28, hidden_size=1024),
    ],
)
def test_absurd_sizes_are_refused_before_they_are_built(sizes, monkeypatch):
    give_memory(monkeypatch, 24e9)
    with pytest.raises(UserError, match="parameters with a batch of .* GB of memory, and there are 24; try a smaller"):
        check_size(Config(**{"image_size": 28, **sizes}), CPU)


def test_the_size_is_at_most_what_a_training_takes(monkeypatch):
    """Weights, gradients, their average and two moments of AdamW; in parts of the batch there are fewer activations."""
    config = preset("DiT-S/8", batch_size=2**16)
    for fewer in (
        dict(accumulation_steps=2**10),
        dict(activation_checkpointing=True, accumulation_steps=2**6),
    ):
        give_memory(monkeypatch, 4e9)
        with pytest.raises(UserError):
            check_size(config, CPU)
        check_size(config.replace(**fewer), CPU)
    parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
    for optimizer, copies in (("adamw", 5), ("muon", 4)):
        small = config.replace(batch_size=1, optimizer=optimizer)
        give_memory(monkeypatch, 4 * copies * parameters - 4096)
        with pytest.raises(UserError):
            check_size(small, CPU)
        give_memory(monkeypatch, 4 * copies * parameters * 1.05)
        check_size(small, CPU)


def test_precision_follows_the_machine(monkeypatch):
    assert machine.choose_precision("bf16", CPU) == "bf16"
    for avx512, amx, expected in ((False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=avx512: answer)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=amx: answer)
        assert machine.choose_precision("auto", CPU) == expected


def test_a_compiler_that_is_switched_off_is_said_aloud(capsys):
    model = torch.nn.Linear(2, 2)
    with torch._dynamo.config.patch(disable=True):  # what TORCH_COMPILE_DISABLE=1 does
        assert compile_network(model, lambda network: network(torch.ones(1, 2)).sum()) is model
    assert "nothing is compiled, for TORCH_COMPILE_DISABLE is set" in capsys.readouterr().out


def test_a_compiler_that_fails_is_said_aloud(monkeypatch, capsys):
    def broken(model):
        def network(*_):
            raise PermissionError("no folder for the cache")

        return network

    monkeypatch.setattr(machine.torch, "compile", broken)
    model = torch.nn.Linear(2, 2)
    assert compile_network(model, lambda network: network(torch.ones(1, 2)).sum()) is model
    assert "compiling failed (PermissionError)" in capsys.readouterr().out
    assert all(parameter.grad is None for parameter in model.parameters())
