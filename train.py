"""Train a DiT: `python train.py`, from random weights to digits, or to pictures. The loop is at the end of `train`.

Every step draws images, labels, timesteps and noise from a generator seeded by (seed, step) alone, and a
checkpoint holds all the rest; so a run that is cut off anywhere and resumed on the same machine ends with the
same bits.
"""

from support.start import start_quietly

if __name__ == "__main__":
    start_quietly()  # before all else is imported

import copy
import dataclasses
import math
import sys
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from config import Config
from dataset import Dataset
from diffusion import Diffusion
from inference import denoise
from support import distributed
from support.autoencoder import decode
from support.checkpoint import asked_for, build_model, build_process, check_size, start_from
from support.command_line import Parser, command, run_script
from support.files import locked
from support.machine import Ahead, choose_device, compile_network, deferred_signals, sum_in_order
from support.pictures import save_loss_plot, save_png
from support.prepare import check_same, prepare
from support.run_log import RunLog, print_summary
from support.run_state import begun, refuse_trained, restore_run, save_run
from variants.muon import muon_for

OF_THE_DATA = ("in_channels", "num_classes", "class_names", "caption_length", "captions", "latents")  # are no flags


def learning_rate_at(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine's fall to 0 at the last step, or none."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    decay = 1.0 if config.lr_decay == "constant" else (1 + math.cos(math.pi * step / config.train_steps)) / 2
    return config.learning_rate * warmup * decay


def ema_decay_at(step: int, config: Config) -> float:
    """ema_decay, less at the start, so that the average soon forgets the random weights it began with."""
    return min(config.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
@record_function("average")
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, for every parameter; what is not trained is the same in both."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)  # in one call, not hundreds


def build_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the blocks' matrices (see variants/muon.py), AdamW for the rest."""
    muon = [muon_for(model.blocks, config.weight_decay)] if config.optimizer == "muon" else []
    taken = {p for optimizer in muon for group in optimizer.param_groups for p in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and p not in taken]
    return [torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True), *muon]


@record_function("data")
def draw_batch(
    data: Dataset, process: Diffusion, config: Config, step: int, device: torch.device | str = "cpu", part=slice(None)
) -> list[tuple[Tensor, ...]]:
    """A step's batch in accumulation_steps parts: x0 (B, C, H, W), y (B,) or (B, L), t (B,), noise (B, C, H, W).

    x0 is in [-1, 1], or a latent. All of it follows from (seed, step). Some labels, or captions, are dropped, for
    guidance: the null class stands in their place. With flip, half of the images are mirrored. Each of several
    processes draws all this, and keeps its `part`.
    """
    generator = torch.Generator(device).manual_seed((config.seed * 0x9E3779B1 + step) % 2**32)  # seeds start far apart
    shape = (config.batch_size,)
    index = torch.randint(len(data.labels), shape, device=device, generator=generator)
    dropped = torch.rand(shape, device=device, generator=generator) < config.label_dropout
    mirrored = torch.rand(shape, device=device, generator=generator) < 0.5 if config.flip else None
    x0, y = data.draw(index, mirrored, generator, part)
    with record_function("noise"):
        drawn = process.draw_noise(x0[:1].expand(*shape, -1, -1, -1), generator, step / config.train_steps)
    dropped = dropped[part].view(-1, *[1] * (y.ndim - 1))  # a caption as a whole
    batch = (x0, y.masked_fill(dropped, config.num_classes), *(tensor[part] for tensor in drawn))
    return list(zip(*(tensor.chunk(config.accumulation_steps) for tensor in batch)))


def save_samples(step: int, ema: nn.Module, config: Config, vae: nn.Module | None, device: torch.device) -> Path | None:
    """A grid of samples, a row for each of at most ten y, the same noise every time: only learning changes it."""
    if not (distributed.first() or config.shard):
        return None  # the first process alone has all that it takes
    asked, names = asked_for(config)
    count = min(len(names), 10)
    some = [round(i * (len(names) - 1) / max(1, count - 1)) for i in range(count) for _ in range(8)]
    y = torch.tensor([asked[i] for i in some], device=device)
    config = config.replace(sample_steps=min(config.sample_steps, 50))  # a preview
    for x in denoise(ema, config, y, torch.Generator(device).manual_seed(config.seed)):
        pass
    path = config.run_dir / "samples" / f"step_{step:07d}.png"
    if distributed.first():
        save_png(decode(vae, x), path, columns=8, labels=config.class_names and [names[i] for i in some])
    return path


def train(config: Config, state: dict[str, Any] | None = None) -> Path:
    """Train until config.train_steps, from scratch or on from a checkpoint's state; returns the run's folder."""
    out_dir = config.run_dir
    device, part = choose_device(config.device), distributed.own_part(config)
    with distributed.first_then_others():
        config, data, vae = prepare(config, device)
    check_same(data)
    check_size(config, device)

    sum_in_order(device)
    torch.manual_seed(config.seed)
    model = build_model(config)
    if config.init_from and not state:
        start_from(config.init_from, model, config)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    model, ema = (distributed.spread(network, device, config.shard) for network in (model, ema))
    process, optimizers = build_process(config, ema, state), build_optimizers(model, config)
    step, *counters = restore_run(state, out_dir, data, model, ema, optimizers) if state else (0, [], 0.0, 0, 0.0)

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")  # not of the loss
    batch_of = partial(draw_batch, data, process, config, device=device, part=part)
    num_parts = distributed.processes() * config.accumulation_steps

    def try_step(network: nn.Module) -> Tensor:
        x0, y, *drawn = batch_of(step)[0]
        return process.loss(autocast(network), x0, y, drawn=drawn)

    def save_checkpoint() -> None:
        save_run(out_dir, config, data, process, model, ema, optimizers, [step, *log.counters()])

    with ExitStack() as stack:
        if distributed.first():
            (out_dir / "samples").mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out_dir))
            if not state:
                refuse_trained(out_dir)  # asked before, but another run may have ended here meanwhile
        distributed.check_shared(out_dir)
        log = stack.enter_context(closing(RunLog(config, out_dir / "loss.csv", device, step, *counters)))
        if not state:
            save_checkpoint()  # so that there is something to resume from the first moment on
        print_summary(config, model, data, device, step)
        compiling = config.compile == "on" and step < config.train_steps
        network = autocast(compile_network(model, try_step, distributed.together()) if compiling else model)
        if data.images.device.type != device.type:  # they do not fit on the GPU
            batch_of = stack.enter_context(closing(Ahead(batch_of, config.train_steps, device)))
        # From here on Ctrl-C saves; while compiling it acts at once.
        signals = stack.enter_context(deferred_signals(patient=distributed.together()))
        while step < config.train_steps and not log.stop:
            start = time.perf_counter()
            learning_rate = learning_rate_at(step, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate

            loss = torch.zeros((), device=device)
            for x0, y, *drawn in batch_of(step):  # the batch, or parts of it
                part_loss = process.loss(network, x0, y, drawn=drawn) / num_parts
                part_loss.backward()
                loss += part_loss.detach()
            stop = torch.full((), float(bool(signals)), device=device)
            distributed.add_up(model, loss, stop)
            with record_function("clipping"):
                norm = distributed.full(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            update_ema(ema, model, ema_decay_at(step, config))

            step += 1
            log.add(step, torch.stack([loss, norm, stop]), learning_rate, start)
            if step % config.checkpoint_every == 0 and step < config.train_steps:
                save_checkpoint()
            if step % config.sample_every == 0 and step < config.train_steps:
                log.add_picture(step, save_samples(step, ema, config, vae, device))
        save_checkpoint()

    if distributed.first():
        save_loss_plot(out_dir / "loss.png", log.rows)
    if step < config.train_steps:
        print(f"stopped at step {step:,}; to go on: {command('train.py', '--resume', '--out-dir', out_dir)}")
        if distributed.together():
            return out_dir  # torchrun would take anything else for a failure
        sys.exit(128 + signals[0])
    log.add_picture(step, save_samples(step, ema, config, vae, device))
    print(f"done; to see images: {command('inference.py', '--checkpoint', out_dir / 'model.pth')}")
    return out_dir


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Train a DiT on digits, or on your own pictures. Defaults are those of preset digits.")
    parser.add_fields(*(f.name for f in dataclasses.fields(Config) if f.name not in OF_THE_DATA))
    parser.group("basics").add_argument("--resume", action="store_true", help="go on from --out-dir's checkpoint")
    with distributed.joined():
        given = vars(parser.parse_args(argv))
        train(*begun(given))


if __name__ == "__main__":
    run_script(main)
