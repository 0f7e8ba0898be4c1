"""What a training run tells: what it is, how far it is, loss.csv."""

import math
import time
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import OPTIONS, Config
from dataset import Dataset
from support.command_line import Progress, shown
from support.distributed import first, processes
from support.files import append_line, writing
from support.run_state import diverged
from support.watching import Board, profiler

COLUMNS = "step,loss,learning_rate,images_per_second"


def print_summary(config: Config, model: nn.Module, data: Dataset, device: torch.device, step: int) -> None:
    """What will be done, before it is: a line on each part."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    images = f"{len(data.labels):,} images of {(data.channels, *data.images.shape[2:])}"  # of latents more is kept
    labels = f"{config.num_classes} labels"
    if config.caption_length:
        labels = f"captions, of {config.num_classes - 1} different words"
    options = ("prediction", *OPTIONS[config.process], "time_sampling", "time_mean")
    threads = f"{torch.get_num_threads()} threads" + (f" in each of {processes()} processes" if processes() > 1 else "")
    print(f"device     {device}, {config.precision}, {threads}, compile {config.compile}")
    print(f"data       {shown(data.name)}: {images}, {labels}")
    print(f"model      {parameters:,} parameters: hidden {config.hidden_size}, depth {config.depth}, {config.block}")
    print(f"process    {config.process}: " + ", ".join(f"{name} {getattr(config, name)}" for name in options))
    print(f"steps      {step:,} of {config.train_steps:,} done, {config.batch_size} images each")
    print(f"files      {shown(config.run_dir)}/: checkpoint.pth, model.pth, loss.csv, loss.png, samples/", flush=True)


class RunLog:
    """The rows of loss.csv, each the mean of the steps since the last; and the progress.

    Args:
        step: steps done already.
        rows: of loss.csv, so far.
        loss_sum, loss_count, seconds: of the steps since the last row.
    """

    def __init__(
        self,
        config: Config,
        path: Path,
        device: torch.device,
        step: int,
        rows: list[str],
        loss_sum: float,
        loss_count: int,
        seconds: float,
    ):
        self.config, self.path, self.first_step = config, path, step
        self.rows, self.loss_sum, self.loss_count, self.seconds = rows, loss_sum, loss_count, seconds
        self.since_start, self.norms, self.unread, self.stop = 0.0, [], [], False
        self.board = Board(config, device, step) if config.tensorboard and first() else None
        self.profiler = profiler(config, step) if config.profile and first() and step < config.train_steps else None
        if first():
            with writing(path) as csv:
                csv.write("".join(line + "\n" for line in (COLUMNS, *rows)).encode())
        self.bar: Progress | None = None  # it appears with the first step, below what else there is to say

    def counters(self) -> list:
        """What a checkpoint keeps, for this log to go on from."""
        return [self.rows, self.loss_sum, self.loss_count, self.seconds]

    def add(self, step: int, told: Tensor, learning_rate: float, start: float) -> None:
        """Note a step done, which began at `start`: its loss, gradient's norm, and above 0 if somebody wants to stop.

        Reading them waits for the device. A CPU has nothing better to do; else it is done now and then, and before
        each write. All processes read at the same steps; `stop` says then whether to.

        Raises:
            UserError: if one that is read is not a finite number.
        """
        self.unread.append((step, told, learning_rate))
        config, now_and_then = self.config, 1 if told.device.type == "cpu" else 10
        periods = (now_and_then, config.log_every, config.checkpoint_every, config.sample_every)
        due = step == config.train_steps or any(step % period == 0 for period in periods)
        numbers = torch.stack([told for _, told, _ in self.unread]).tolist() if due else []
        seconds = time.perf_counter() - start
        self.seconds, self.since_start = self.seconds + seconds, self.since_start + seconds
        for (step, _, learning_rate), (loss, norm, stop) in zip(self.unread, numbers):
            if not math.isfinite(loss + norm):
                raise diverged(self.path.parent, f"the loss is {loss}, its gradient's norm {norm}", step)
            self.tell(step, loss, norm, learning_rate)
            self.stop |= stop > 0
        self.unread = [] if due else self.unread
        if self.profiler:
            self.profiler.step()

    def tell(self, step: int, loss: float, norm: float, learning_rate: float) -> None:
        """Tell of a step done."""
        self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        self.norms.append(norm)
        done = step == self.config.train_steps
        if self.bar is None:
            self.bar = Progress(self.config.train_steps, done=self.first_step, leave=True)
        if step % self.config.log_every == 0 or done:
            mean, speed = self.loss_sum / self.loss_count, self.loss_count * self.config.batch_size / self.seconds
            self.rows.append(f"{step},{mean:.6f},{learning_rate:.6g},{speed:.1f}")
            if first():
                append_line(self.path, self.rows[-1])
            self.bar.note = f"loss {mean:.4f}, {speed:,.0f} images/s"
            if self.board:
                self.board.add_figures(step, mean, learning_rate, fmean(self.norms), speed)
            self.loss_sum, self.loss_count, self.norms, self.seconds = 0.0, 0, [], 0.0
        self.bar.update()
        if step == self.first_step + 50 and not done:
            tqdm.write(f"about {self.since_start / 50 * (self.config.train_steps - step) / 60:.1f} minutes to go")

    def add_picture(self, step: int, path: Path | None) -> None:
        """Show a file of samples, where there is more than files to show them."""
        if self.board and path:
            self.board.add_picture(step, path)

    def close(self) -> None:
        if self.profiler:
            self.profiler.stop()
        if self.bar is not None:
            self.bar.close()
