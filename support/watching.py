"""To watch a run: its figures and pictures in TensorBoard (--tensorboard), where its time goes (--profile)."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import profile, schedule
from tqdm import tqdm

from config import Config
from support.checkpoint import empty_model
from support.command_line import shown
from support.errors import optional
from support.files import writing
from support.speed import count_gflops, matmul_peak

SKIPPED, PROFILED = 5, 5  # steps: the first ones of a run are slower than those that follow
# What train.py and what it calls label by record_function; torch labels the optimizers itself.
LABELS = ("data", "noise", "waiting for others", "clipping", "optimizer", "average")
DEAREST = 10  # operators in the table


def check_tensorboard() -> None:
    """UserError where TensorBoard, which is an extra package, is not installed."""
    optional("tensorboard", "--tensorboard")


class Board:
    """TensorBoard's events.* files of a run, in its folder.

    Args:
        step: steps done already; of later ones, which an earlier process may have written of, nothing is shown.
        processes: how many compute the images.
    """

    def __init__(self, config: Config, device: torch.device, step: int, processes: int):
        from torch.utils.tensorboard import SummaryWriter  # here, for it takes seconds

        self.writer = SummaryWriter(config.run_dir, purge_step=step + 1)
        flop = 3 * 2e9 * count_gflops(empty_model(config))  # of an image; the backward pass counts two forward ones
        self.share = flop / (processes * matmul_peak(device, config.precision))  # of the peak, by an image a second

    def add_figures(self, step: int, loss: float, learning_rate: float, norm: float, speed: float) -> None:
        """The figures of a row of loss.csv, the gradient's mean norm, and the share of the device's measured peak."""
        figures = {"loss": loss, "learning rate": learning_rate, "gradient norm": norm, "images per second": speed}
        for name, figure in (figures | {"share of matmul peak": speed * self.share}).items():
            self.writer.add_scalar(name, figure, step)
        self.writer.flush()

    def add_picture(self, step: int, path: Path) -> None:
        """A grid of samples, as it is in a file."""
        from PIL import Image
        import numpy as np

        self.writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self.writer.flush()


def profiler(out_dir: Path, steps: int) -> profile:
    """torch.profiler for a few of the next steps, each of which ends with its `step()`: see `report`."""
    skipped = max(0, min(SKIPPED, steps - PROFILED))
    plan = schedule(wait=max(0, skipped - 1), warmup=min(1, skipped), active=min(PROFILED, steps), repeat=1)
    return profile(schedule=plan, on_trace_ready=partial(report, out_dir / "trace.json"))


def report(path: Path, profiled: profile) -> None:
    """Write what was profiled, for Perfetto or chrome://tracing, and print where a step's time went."""
    with writing(path) as file:
        profiled.export_chrome_trace(file.name)
    for line in describe(profiled.key_averages()):
        tqdm.write(line)
    tqdm.write(f"profile    {shown(path)}: open it at ui.perfetto.dev, or in chrome://tracing")


def describe(events: Iterable) -> list[str]:
    """Two tables of averages of a profile: the parts of a step, and the dearest operators by their own time.

    Where there is a GPU the times are its own; how long a step takes in all is the clock's.
    """
    of_gpu = any(event.device_type == DeviceType.CUDA for event in events)
    events = [event for event in events if event.device_type == DeviceType.CPU]
    kind = "device" if of_gpu else "cpu"
    steps = next(event for event in events if event.key == "ProfilerStep*")
    own = {event.key: getattr(event, f"self_{kind}_time_total") for event in events if not is_label(event.key)}
    parts = dict.fromkeys(LABELS, 0.0)
    for event in events:
        name = "optimizer" if event.key.startswith("Optimizer.") else event.key
        if name in parts:
            parts[name] += getattr(event, f"{kind}_time_total")
    parts["data"] = max(0.0, parts["data"] - parts["noise"])  # in the midst of which it is drawn
    return []
