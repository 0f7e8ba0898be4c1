"""Train a DiT: `python train.py`, from random weights to digits. The loop is at the end of `train`.

Every step draws images, labels, timesteps and noise from a generator seeded by (seed, step) alone, and a
checkpoint holds all the rest; so a run that is cut off anywhere and resumed ends with the same bits.
"""

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

from config import OPTIONS, Config, Parser, UserError, preset, run_script
from dataset import load_dataset, normalize
from support.checkpoint import build_model, build_process, denoise, load_file, model_config, read_config, save_file
from support.machine import choose_compile, choose_device, choose_precision, compile_network, deferred_signals

FREE_ON_RESUME = ("out_dir", "data_dir", "device", "sample_every", "checkpoint_every")


def learning_rate_at(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine's fall to 0 at the last step, or none."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_decay == "constant":
        return config.learning_rate * warmup
    return config.learning_rate * warmup * (1 + math.cos(math.pi * step / config.train_steps)) / 2


def ema_decay_at(step: int, config: Config) -> float:
    """ema_decay, less at the start, so that the average soon forgets the random weights it began with."""
    return min(config.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, for every trained parameter."""
    for average, parameter in zip(ema.parameters(), model.parameters()):
        if parameter.requires_grad:
            average.lerp_(parameter, 1 - decay)


def build_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon (Jordan et al., 2024) for the blocks' matrices, AdamW for the rest.

    Muon makes all singular values of an update equal; match_rms_adamw scales it to the size of one of AdamW's, so
    that both take the same learning rate (Liu et al., 2025).
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2] if config.optimizer == "muon" else []
    chosen = set(matrices)
    rest = [p for p in model.parameters() if p.requires_grad and p not in chosen]
    optimizers = [torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)]
    if matrices:
        settings = {"weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(matrices, **settings))
    return optimizers


def draw_batch(images: Tensor, labels: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random batch: x0 (B, C, H, W) in [-1, 1] and y (B,), some of whose labels are dropped for guidance."""
    shape = (config.batch_size,)
    index = torch.randint(len(images), shape, device=images.device, generator=generator)
    dropped = torch.rand(shape, device=images.device, generator=generator) < config.label_dropout
    return normalize(images[index]), labels[index].masked_fill(dropped, config.num_classes)


def save_samples(path: Path, ema: nn.Module, config: Config, device: torch.device) -> None:
    """A grid of samples, a row for each label, the same noise every time, so that only learning changes it."""
    y = torch.arange(min(config.num_classes, 10), device=device).repeat_interleave(8)
    config = config.replace(sample_steps=min(config.sample_steps, 50))  # a preview
    for x in denoise(ema, config, y, torch.Generator(device).manual_seed(config.seed)):
        pass
    save_image(x, path, nrow=8, normalize=True, value_range=(-1, 1))


def save_loss_plot(path: Path, rows: list[str]) -> None:
    """loss.csv as a picture."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([int(row.split(",")[0]) for row in rows], [float(row.split(",")[1]) for row in rows])
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    figure.savefig(path, dpi=120)


def train(config: Config, state: dict[str, Any] | None = None) -> Path:
    """Train until config.train_steps, from scratch or on from a checkpoint's state; returns the run's folder."""
    out_dir = config.run_dir
    if not state and (out_dir / "checkpoint.pth").exists():
        raise UserError(f"{out_dir}/checkpoint.pth is there already; go on with --resume, or give another --out-dir")
    if out_dir.resolve() == Path(__file__).parent.resolve():
        raise UserError(f"--out-dir {out_dir} is the program's own folder, with its model.pth; give another")
    device = choose_device(config.device)
    data = load_dataset(config.dataset, config.data_dir, image_size=config.image_size)
    images, labels = data.images.to(device), data.labels.to(device)
    config = config.replace(
        dataset=data.name,
        image_size=images.shape[-1],
        in_channels=images.shape[1],
        num_classes=int(labels.max()) + 1,
        precision=choose_precision(config.precision, device),
        compile=choose_compile(config.compile, config.train_steps),
    )

    # Sums in a fixed order: compiled code would add up the label embedding's gradient as the threads come.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a slow safeguard of no use here
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    process = build_process(config)
    optimizers = build_optimizers(model, config)
    generator = torch.Generator(device)
    step, rows, loss_sum, loss_count, seconds = 0, [], 0.0, 0, 0.0  # sum, count and seconds are since the last row
    if state:
        try:
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            step, rows, loss_sum, loss_count, seconds = state["progress"]
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{out_dir}/checkpoint.pth does not fit its config or the data {data.name}") from error

    def save_checkpoint() -> None:
        content = {"config": vars(config), "model": model.state_dict(), "ema": ema.state_dict()}
        content |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        content |= {"progress": [step, rows, loss_sum, loss_count, seconds]}
        save_file(content, out_dir / "checkpoint.pth")
        save_file({"model": ema.state_dict(), "config": model_config(config)}, out_dir / "model.pth")

    def backward(network: Callable) -> Tensor:
        """Add a batch's gradient to the parameters', in accumulation_steps parts; returns its loss."""
        x0, y = draw_batch(images, labels, config, generator)
        batch, loss = (x0, y, *process.draw(x0, generator)), torch.zeros((), device=device)
        for x0, y, *drawn in zip(*(tensor.chunk(config.accumulation_steps) for tensor in batch)):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                part_loss = process.loss(network, x0, y, drawn=drawn) / config.accumulation_steps
            part_loss.backward()
            loss += part_loss.detach()
        return loss

    (out_dir / "samples").mkdir(parents=True, exist_ok=True)
    if not state:
        save_checkpoint()  # so that there is something to resume from the first moment on
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"device     {device}, {config.precision}, {torch.get_num_threads()} threads, compile {config.compile}")
    print(f"data       {data.name}: {len(images):,} images of {tuple(images.shape[1:])}, {config.num_classes} labels")
    print(f"model      {parameters:,} parameters: hidden {config.hidden_size}, depth {config.depth}, {config.block}")
    options = ("prediction", *OPTIONS[config.process], "time_sampling", "time_mean")
    print(f"process    {config.process}: " + ", ".join(f"{name} {getattr(config, name)}" for name in options))
    print(f"steps      {step:,} of {config.train_steps:,} done, {config.batch_size} images each")
    print(f"files      {out_dir}/: checkpoint.pth, model.pth, loss.csv, loss.png, samples/", flush=True)
    with (
        deferred_signals() as signals,
        open(out_dir / "loss.csv", "w") as csv,
        tqdm(total=config.train_steps, initial=step, unit="step", disable=step >= config.train_steps) as bar,
    ):
        csv.write("".join(line + "\n" for line in ["step,loss,learning_rate,images_per_second", *rows]))
        compiling = config.compile == "on" and step < config.train_steps
        network = compile_network(model, backward) if compiling else model
        first_step = step
        clock = start = time.perf_counter()
        while step < config.train_steps and not signals:
            generator.manual_seed((config.seed * 0x9E3779B1 + step) % 2**32)  # runs of other seeds start far away
            learning_rate = learning_rate_at(step, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate

            loss = backward(network)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            if not math.isfinite(loss.item() + norm.item()):
                raise UserError(
                    f"the loss is {loss.item()} and its gradient's norm {norm.item()} at step {step + 1}; "
                    f"{out_dir}/checkpoint.pth is the last good one; begin anew with a smaller --learning-rate"
                )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            update_ema(ema, model, ema_decay_at(step, config))

            step, loss_sum, loss_count = step + 1, loss_sum + loss.item(), loss_count + 1
            seconds, clock = seconds + time.perf_counter() - clock, time.perf_counter()
            done = step == config.train_steps
            bar.update()
            if step % config.log_every == 0 or done:
                mean, speed = loss_sum / loss_count, loss_count * config.batch_size / seconds
                rows.append(f"{step},{mean:.6f},{learning_rate:.6g},{speed:.1f}")
                csv.write(rows[-1] + "\n")
                csv.flush()
                bar.set_postfix_str(f"loss {mean:.4f}, {speed:,.0f} images/s")
                loss_sum, loss_count, seconds = 0.0, 0, 0.0
            if step == first_step + 50 and not done:
                minutes = (time.perf_counter() - start) / 50 * (config.train_steps - step) / 60
                tqdm.write(f"about {minutes:.1f} minutes to go")
            if step % config.sample_every == 0 and not done:
                save_samples(out_dir / "samples" / f"step_{step:07d}.png", ema, config, device)
                clock = time.perf_counter()
            if step % config.checkpoint_every == 0 and not done:
                save_checkpoint()
                clock = time.perf_counter()
        save_checkpoint()

    save_loss_plot(out_dir / "loss.png", rows)
    if step < config.train_steps:
        print(f"stopped at step {step:,}; to go on: python train.py --resume --out-dir {out_dir}")
        sys.exit(128 + signals[0])
    save_samples(out_dir / "samples" / f"step_{step:07d}.png", ema, config, device)
    print(f"done; to see digits: python inference.py --checkpoint {out_dir / 'model.pth'}")
    return out_dir


def resumed(given: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The config and state of the checkpoint to go on from; UserError if it is not there or a flag contradicts it."""
    chosen = {name: given[name] for name in ("preset", "out_dir") if name in given}
    path = Config(**chosen).run_dir / "checkpoint.pth"
    if not path.exists():
        raise UserError(f"nothing to resume: {path} does not exist; leave out --resume, or name the run's --out-dir")
    state = load_file(path)
    if not isinstance(state, dict) or state.keys() != {"config", "model", "ema", "optimizers", "progress"}:
        raise UserError(f"{path} is not a checkpoint of train.py")
    config = read_config(state["config"], path)
    free = FREE_ON_RESUME + (("train_steps",) if config.lr_decay == "constant" else ())
    for name, value in given.items():
        if name not in free and value not in (getattr(config, name), "auto"):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} differs from the run's {getattr(config, name)}; leave it out to resume")
    changes = {name: value for name, value in given.items() if name in free}
    return config.replace(**{**changes, "out_dir": str(path.parent)}), state


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Train a DiT on digits.")
    parser.add_fields(*(f.name for f in dataclasses.fields(Config) if f.name not in ("in_channels", "num_classes")))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out-dir, exactly")
    given = vars(parser.parse_args(argv))
    if given.pop("resume", False):
        train(*resumed(given))
        return
    train(preset(given.pop("preset", "digits"), **given))


if __name__ == "__main__":
    run_script(main)
