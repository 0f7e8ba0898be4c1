"""How fast a device is, and how much work a network: the two figures behind "share of peak"."""

import math
import time
from collections.abc import Callable

import torch
from torch import nn

MATMUL_SIZE = {"cpu": 4096, "cuda": 8192}
PEAK_SECONDS = 0.2  # the least that a timed sample of the peak lasts


def count_gflops(model: nn.Module) -> float:
    """Gflops of a forward pass of a DiT for one image, a multiply-add counted once, as the paper counts."""
    from torch.utils.flop_counter import FlopCounterMode  # here, for it loads the GPU's compiler, Triton

    device, size = next(model.parameters()).device, model.image_size
    x, t = torch.zeros(1, model.in_channels, size, size, device=device), torch.zeros(1, device=device)
    length = getattr(model.y_embedder, "length", None)  # of a caption
    y = torch.zeros((1, length) if length else 1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y)
    return counter.get_total_flops() / 2e9


def seconds_of(call: Callable, calls: int, device: torch.device) -> float:
    """Mean seconds a call, of so many in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / calls


def matmul_peak(device: torch.device, precision: str) -> float:
    """The most FLOP/s that large square matrix products reach, a multiply-add counted as two."""
    size = MATMUL_SIZE.get(device.type, 4096)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds_of(lambda: a @ a, 1, device)  # the first one also loads the library
    calls = math.ceil(PEAK_SECONDS / seconds_of(lambda: a @ a, 1, device))
    return 2 * size**3 / min(seconds_of(lambda: a @ a, calls, device) for _ in range(5))
