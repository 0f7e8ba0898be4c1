"""To watch a run: its figures and pictures in TensorBoard (--tensorboard), where its time goes (--profile)."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import profile, schedule
from tqdm import tqdm

from config import Config
from support.checkpoint import empty_model
from support.command_line import shown
from support.distributed import processes
from support.files import writing
from support.speed import count_gflops, matmul_peak

SKIPPED, PROFILED = 5, 5  # steps: the first ones of a run are slower than those that follow
# Parts of a step that are labelled by record_function; optimizers have labels of torch's own.
LABELS = ("data", "noise", "waiting for others", "clipping", "optimizer", "average")
DEAREST = 10  # operators in the table


class Board:
    """TensorBoard's events.* files of a run, in its folder.

    Args:
        step: steps done already; what an earlier process wrote of later ones is not shown.
    """

    def __init__(self, config: Config, device: torch.device, step: int):
        from torch.utils.tensorboard import SummaryWriter  # here, for it takes seconds

        self.writer = SummaryWriter(config.run_dir, purge_step=step + 1)
        flop = 3 * 2e9 * count_gflops(empty_model(config))  # of an image; the backward pass counts two forward ones
        self.share = flop / (processes() * matmul_peak(device, config.precision))  # of the peak, by an image a second

    def add_figures(self, step: int, loss: float, learning_rate: float, norm: float, speed: float) -> None:
        """The figures of a row of loss.csv, the gradient's mean norm, and the share of the device's measured peak."""
        figures = {"loss": loss, "learning rate": learning_rate, "gradient norm": norm, "images per second": speed}
        for name, figure in (figures | {"share of matmul peak": speed * self.share}).items():
            self.writer.add_scalar(name, figure, step)
        self.writer.flush()

    def add_picture(self, step: int, path: Path) -> None:
        """A grid of samples, as it is in a file."""
        with Image.open(path) as picture:
            self.writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()


def profiler(config: Config, step: int) -> profile:
    """torch.profiler at work, for a few of the steps to come, each of which ends with its `step()`; see `report`."""
    left = config.train_steps - step
    skipped = min(SKIPPED, max(1, left - PROFILED), left - 1)
    plan = schedule(wait=max(0, skipped - 1), warmup=min(1, skipped), active=min(PROFILED, left - skipped), repeat=1)
    profiling = profile(schedule=plan, on_trace_ready=partial(report, config.run_dir / "trace.json"), acc_events=True)
    profiling.start()
    return profiling


def report(path: Path, profiling: profile) -> None:
    """Write what was profiled, for Perfetto or chrome://tracing, and print where a step's time went."""
    with writing(path) as file:
        profiling.export_chrome_trace(file.name)
    for line in tables_of(list(profiling.key_averages())):
        tqdm.write(line)
    tqdm.write(f"{shown(path)} shows each step at ui.perfetto.dev, or in chrome://tracing")


def tables_of(events: list) -> list[str]:
    """Of a profile's averages two tables: the parts of a step, and the operators that took the most time themselves.

    Where there is a GPU all times are its own, but for that of a whole step.
    """
    gpu = any(event.device_type == DeviceType.CUDA for event in events)
    kind = "device" if gpu else "cpu"
    events = [event for event in events if event.device_type == DeviceType.CPU]
    steps = next((event for event in events if event.key == "ProfilerStep*"), None)
    if steps is None:  # the run ended in the midst of the first one
        return []
    parts, operators = dict.fromkeys(LABELS, 0.0), {}
    for event in events:
        name = "optimizer" if event.key.startswith("Optimizer.") else event.key
        if name in parts:
            parts[name] += getattr(event, f"{kind}_time_total")
        elif event is not steps:
            operators[name] = getattr(event, f"self_{kind}_time_total")
    parts["data"] -= parts["noise"]  # which is drawn along with it
    total = sum(operators.values()) if gpu else steps.cpu_time_total
    parts = {"network, and all else": total - sum(parts.values()), **parts}
    operators = dict(sorted(operators.items(), key=lambda item: -item[1])[:DEAREST])

    def table(title: str, times: dict[str, float]) -> list[str]:
        rows = [f"{name:<50.50}{time / 1000 / steps.count:>10.2f}{time / total:>8.1%}" for name, time in times.items()]
        return [f"{title:<50}{'ms':>10}{'share':>8}", *rows, ""]

    busy = f", the GPU at work {total / steps.cpu_time_total:.0%} of it" if gpu else ""
    heading = f"{steps.count} steps of {steps.cpu_time_total / 1000 / steps.count:.2f} ms{busy}"
    return ["", heading, "", *table("a part of a step", parts), *table("an operator", operators)]
