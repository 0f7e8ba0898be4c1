"""Several processes, one run: what `torchrun --nproc-per-node N train.py` needs beside the plain loop of train.py.

Each process holds the whole network and computes its part of every batch; what is random is drawn for the whole batch
in all of them, from (seed, step), so that N processes train on the numbers that one would. Then one all-reduce adds up
the gradients. It is not DistributedDataParallel's, which rearranges its sums after the first step of a process's
life: a run that goes on from a checkpoint would end with other bits. Alone, a process does nothing of all this.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from config import Config
from support.errors import UserError

store: dist.Store | None = None  # what the processes of this launch tell one another outside of collectives


def together() -> bool:
    """Whether torchrun started this process, perhaps with others."""
    return dist.is_available() and dist.is_initialized()


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if together() else 1


def first() -> bool:
    """Whether this is the process that prints, draws and writes."""
    return not together() or dist.get_rank() == 0


def launch_name() -> str | None:
    """The name of this launch of torchrun, which is the same after each of its restarts."""
    return store.underlying_store.compare_set("launch", "", uuid.uuid4().hex).decode() if together() else None


def meet() -> None:
    """Wait until all processes are here."""
    if together():
        dist.all_reduce(torch.zeros(1))


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Meanwhile the processes that torchrun started are one run: the first alone is heard, and all end together.

    Of a mistake one process tells, whichever meets it first; that others fail when it has gone is no news.
    """
    global store
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    shared, rank, count = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], shared)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        with contextlib.ExitStack() as quiet:
            if rank:
                nowhere = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
            yield
        meet()
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit):  # of --help, or of a flag that nobody knows, which argparse has told
            tells = rank == 0 or not error.code
        else:
            tells = store.add("failures", 1) == 1
        if not tells:
            time.sleep(10)  # until torchrun, which ends all as soon as one has failed, has heard it from the other
            raise SystemExit(1) from error
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise UserError("another process of this run has gone; go on with --resume") from error
        raise
    dist.destroy_process_group()


@contextlib.contextmanager
def first_then_others() -> Iterator[None]:
    """What takes hours once and moments ever after: the first process does it while the others wait, then they do."""
    while not first() and not store.check(["prepared"]):
        time.sleep(0.1)
    yield
    if together() and first():
        store.set("prepared", "")


def check_shared(folder: Path) -> None:
    """UserError on a process that does not see what the first one writes in a folder."""
    if not together():
        return
    token = folder / f"{launch_name()}.tmp"
    if first():
        token.touch()
    meet()
    seen = token.exists()
    meet()
    if first():
        token.unlink()
    if not seen:
        raise UserError(f"{folder} is not the same folder in all processes; give an --out-dir that they share")


def own_part(config: Config) -> slice:
    """The part of each batch that this process computes; UserError if not all processes get as much."""
    parts = processes() * config.accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} is not divisible by {processes()} processes times accumulation_steps "
            f"{config.accumulation_steps}; try {max(1, round(config.batch_size / parts)) * parts}"
        )
    size = config.batch_size // processes()
    rank = dist.get_rank() if together() else 0
    return slice(rank * size, (rank + 1) * size)


@record_function("waiting for others")
def add_up(model: nn.Module, *numbers: Tensor) -> None:
    """The gradients, and the numbers, become their sums over all processes: one all-reduce, always in one order."""
    if processes() == 1:
        return
    tensors = [*(p.grad for p in model.parameters() if p.grad is not None), *numbers]
    sums = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(sums)
    for tensor, part in zip(tensors, sums.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))
