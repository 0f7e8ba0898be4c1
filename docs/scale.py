"""What a step sends and how long it takes, by formula and measured, on one machine: a row of docs/scale.md's table.

    torchrun --nproc-per-node N -m docs.scale --preset DiT-S/8 --dataset glyphs --train-steps 25 --out-dir NEW [--shard]

The flags are train.py's. Processes of one machine talk through its loopback device, whose bytes Linux counts; nothing
else may use it meanwhile (in a network of its own: `unshare -rn sh -c 'ip link set lo up; torchrun ...'`).
"""

import os
import re
import statistics
import sys
import time
from pathlib import Path

import train
from support import distributed
from support.command_line import run_script

WARM_UP = 5  # steps that are not measured


def bytes_sent(parameters: int, processes: int, shard: bool, accumulation_steps: int = 1, gloo: bool = False) -> float:
    """What each process sends in a step on a ring: fp32 gradients twice; or weights twice and gradients, each part.

    gloo, of processes on CPUs, adds up all gradients everywhere even where each process keeps but a part: twice again.
    """
    times = (4 if gloo else 3) * accumulation_steps if shard else 2
    return times * (processes - 1) / processes * 4 * parameters


def loopback_bytes() -> int:
    """What all processes have sent so far."""
    return int(re.search(r"lo:(?:\s+\d+){8}\s+(\d+)", Path("/proc/net/dev").read_text())[1])


def main() -> None:
    marks, add_up = [], distributed.add_up

    def marked(model, *numbers) -> None:
        """add_up, with the time and the bytes before it and after it."""
        start = time.perf_counter()
        add_up(model, *numbers)
        sizes = (
            sum(parameter.numel() for parameter in model.parameters()),
            distributed.processes(),
            numbers[0].device.type,
        )
        marks.append((start, time.perf_counter(), loopback_bytes(), *sizes))

    distributed.add_up = marked
    train.main(sys.argv[1:])
    if os.environ.get("RANK", "0") != "0":
        return
    pairs = list(zip(marks[WARM_UP:], marks[WARM_UP + 1 :]))
    parameters, processes, device = marks[0][3:]
    step = statistics.median(after[1] - before[1] for before, after in pairs)
    waiting = statistics.median(after[1] - after[0] for _, after in pairs)
    sent = statistics.median(after[2] - before[2] for before, after in pairs) / processes
    formula = bytes_sent(parameters, processes, "--shard" in sys.argv, gloo=device == "cpu")
    print(f"| processes | of {parameters:,} parameters | MB sent, formula | measured | ms a step | ms in add_up |")
    kind = "sharded" if "--shard" in sys.argv else "plain"
    print(f"| {processes} | {kind} | {formula / 1e6:.3f} | {sent / 1e6:.3f} | {1e3 * step:.0f} | {1e3 * waiting:.0f} |")


if __name__ == "__main__":
    run_script(main)
