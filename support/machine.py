"""What this machine can do: its device, the precision it computes fastest in, its compiler, its signals."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._pytree import tree_leaves

from support.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device that a config names; "auto" is a GPU where there is one. UserError for one that is not there.

    Of the processes that torchrun starts each has a GPU of its own; that of a Mac does not know others.
    """
    alone = "LOCAL_RANK" not in os.environ
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and alone, "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        raise UserError(f"device {name!r} is not there on this machine; try --device cpu")
    if name == "cuda" and not alone:
        number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= gpus:
            many = os.environ["LOCAL_WORLD_SIZE"]
            raise UserError(f"{many} processes are more than the {gpus} GPUs here; give --nproc-per-node {gpus}")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """The precision to train in; "auto" is bf16 where the processor computes in it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        gains = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if gains else "fp32"


def choose_compile(name: str, train_steps: int) -> str:
    """Whether to compile: "auto" is "on" in runs long enough to win back the half minute it may take."""
    if name != "auto":
        return name
    return "on" if train_steps >= 2000 else "off"


def check_memory(needed: float, what: str, advice: str, device: torch.device | None = None) -> None:
    """Refuse, before the work, what takes more bytes than a device has (the CPU's, unless it is a GPU)."""
    if device is not None and device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # Windows does not tell
        return
    if needed > there:
        raise UserError(
            f"{what} would take {needed / 1e9:,.0f} GB of memory, and there are {there / 1e9:,.0f}; {advice}"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return torch.cuda.mem_get_info(device)[0]


def sum_in_order(device: torch.device) -> None:
    """Have torch add up in a fixed order, so that the same steps end with the same bits.

    Compiled code would add up the label embedding's gradient as the threads come, and so would attention on a GPU;
    there torch insists on an order of matrix products too, which has to be asked for before the first (support/start).
    """
    strict = device.type == "cuda" and "CUBLAS_WORKSPACE_CONFIG" in os.environ
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a slow safeguard of no use here


def compile_network(model: nn.Module, loss_of: Callable[[Callable], Tensor], together: bool = False) -> Callable:
    """The model compiled, tried on the gradient of one loss; or the model itself, said aloud, where none compiles.

    Raises:
        UserError: in place of the latter, where several processes have to do the same (`together`).
    """
    if torch._dynamo.config.disable:
        print("nothing is compiled, for TORCH_COMPILE_DISABLE is set: it is only slower")
        return model
    compiled = torch.compile(model)
    start = time.perf_counter()
    try:
        loss_of(compiled).backward()
    except Exception as error:  # whatever the compiler's trouble is, the run can do without it
        if together:
            raise UserError(
                f"compiling failed on one of the processes ({type(error).__name__}); give --compile off"
            ) from error
        print(f"compiling failed ({type(error).__name__}), so the run goes on without: it is only slower")
        compiled = model
    else:
        print(f"compiled in {time.perf_counter() - start:.0f} s")
    model.zero_grad()
    return compiled


class Ahead:
    """batch_of(step), of which that of the next step is made meanwhile, in a thread, while a GPU is at work.

    On a CPU that trains it would only take the place of the training.

    Args:
        batch_of: a function of the step alone.
        end: the step at which there is no next.
        device: that of the batches.
    """

    def __init__(self, batch_of: Callable[[int], Any], end: int, device: torch.device):
        self.batch_of, self.end = batch_of, end
        self.worker, self.coming = ThreadPoolExecutor(1), {}
        # In a stream of its own, or a batch would wait for all that CUDA has yet to do for the one before it.
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None

    def draw(self, step: int) -> Any:
        """A batch, in the stream of batches."""
        with torch.cuda.stream(self.stream):
            return self.batch_of(step)

    @record_function("data")
    def __call__(self, step: int) -> Any:
        coming = self.coming.pop(step, None) or self.worker.submit(self.draw, step)
        batch = coming.result()
        if self.stream is not None:
            here = torch.cuda.current_stream()
            here.wait_stream(self.stream)
            for tensor in tree_leaves(batch):
                tensor.record_stream(here)  # so that its memory is not taken for a later batch while it is in use
        following = step + 1
        self.coming = {following: self.worker.submit(self.draw, following)} if following < self.end else {}
        return batch

    def close(self) -> None:
        self.worker.shutdown(cancel_futures=True)


@contextlib.contextmanager
def deferred_signals(patient: bool = False) -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM, a lost terminal become numbers in a list, for a loop to end in order; a second acts at once.

    Not so if `patient`: torchrun passes on to its processes what they may have been sent already.
    """
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    usual = {number: signal.getsignal(number) for number in numbers}
    usual = {number: handler for number, handler in usual.items() if handler != signal.SIG_IGN}  # as under nohup
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        if not patient:
            signal.signal(number, usual[number])

    for number in usual:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
