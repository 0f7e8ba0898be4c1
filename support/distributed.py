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
from typing import Any

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
    # Each start has names of its own. (TORCHELASTIC_RESTART_COUNT does not: each machine counts its own failures.)
    store = dist.PrefixStore(str(shared.add(f"starts of {rank}", 1)), shared)
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
    """The part of each batch that this process computes; UserError if not all get as much, or it is alone to shard."""
    if config.shard and not together():
        raise UserError("--shard is for several processes: torchrun --nproc-per-node N train.py --shard ...")
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
    trained = [p for p in model.parameters() if p.grad is not None and not is_shard(p.grad)]  # FSDP2 adds up its own
    tensors = [*(p.grad for p in trained), *numbers]
    sums = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(sums)
    parts = sums.split([tensor.numel() for tensor in tensors])
    for parameter, part in zip(trained, parts):
        parameter.grad = part.view_as(parameter)
    for number, part in zip(numbers, parts[len(trained) :]):
        number.copy_(part[0])


def is_shard(tensor: Tensor | None) -> bool:
    """Whether this process holds but a part of a tensor, as DTensor does."""
    return hasattr(tensor, "full_tensor")


def spread(network: nn.Module, device: torch.device, shard: bool) -> nn.Module:
    """The network on its device; with `shard` each process keeps but its part of each tensor (FSDP2).

    A block is whole only while it computes. Rajbhandari et al., 2020 (ZeRO, stage 3); Zhao et al., 2023.
    """
    if together():
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
    if not shard:
        return network.to(device)
    from torch.distributed.device_mesh import init_device_mesh  # here, for they take seconds
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes(),))
    for module in (*network.blocks, network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # gradients are added up, as by add_up
        module.set_force_sum_reduction_for_comms(True)
    return network


def full(tensor: Tensor) -> Tensor:
    """A tensor that is in shards, put together in all processes, which must all ask for it; else itself."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def whole(state: Any) -> Any:
    """The same dicts and lists with shards put together: all processes must ask, the first gets it, on the CPU."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if not is_shard(state):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if first() else None


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of a tensor that all have, where it keeps but a part of one like it."""
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
