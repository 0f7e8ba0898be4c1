"""How fast and how big: `python benchmark.py` prints tables by size, beside `diffusers` where that is installed.

    images/s    the median of repeated samples, each at least a second long. Forward: no gradients. Training: forward,
                mean squared error, backward, AdamW; the network in evaluation mode, so that nothing is dropped.
    of peak     the share of this machine's measured peak, that of one large square matrix product, that these images
                need: 2 * Gflops each, three times as much in training (the backward pass counts two forward ones)
    memory      the peak in a process of its own, above what torch and its libraries hold before the model is built:
                allocated on a GPU, resident on a CPU under Linux, elsewhere unknown. Eager. Forward is of one image,
                and the ratio of its peak to the weights alone has no allowance for activations.
    activations of a training step: the peak of its forward and backward passes above weights and gradients, which are
                there before; the bf16 copies of weights that autograd keeps count. "Checkpointed": recomputed.
    ratio       the seconds of `diffusers` / ours, the same weights in both. All variants are timed in turn, again and
                again, and a ratio is of two samples of the same round: the median of the rounds, and least to most.

bf16 means autocast, for both; the weights stay fp32. "Compiled" is torch.compile, for both. train.py also asks for sums
in a fixed order (torch.use_deterministic_algorithms), which costs time on a GPU; here both networks go without.
"""

from support.start import start_quietly

if __name__ in ("__main__", "__mp_main__"):  # the latter in the processes that measure memory
    start_quietly()  # before all else is imported

import math
import platform
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import PAPER_MODELS, Config, preset
from dit import DiT
from support.checkpoint import build_model, check_size
from support.command_line import Parser, run_script
from support.errors import UserError
from support.files import check_path, save_json
from support.machine import choose_device, choose_precision, compile_network
from support.published import from_diffusers
from support.speed import count_gflops, matmul_peak, seconds_of

MODES = ("forward", "training")
DEFAULT_MODELS = {"cpu": "digits,DiT-S/8,DiT-S/4,DiT-S/2", "cuda": "DiT-B/2,DiT-L/2,DiT-XL/2"}
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}  # a batch is so many tokens, unless --batch-size says otherwise
SAMPLE_SECONDS = 1.0  # the least that a timed sample lasts


def size_config(name: str) -> Config:
    """The sizes of a model by its name: one of the paper's at 32 x 32 x 4, or "digits". UserError for another."""
    if name in PAPER_MODELS:
        return preset(name, in_channels=4, num_classes=1000)
    if name == "digits":
        return preset(name, image_size=28)
    raise UserError(f"model {name!r} is not one of digits, {', '.join(PAPER_MODELS)}")


def diffusers_dit(config: Config) -> nn.Module:
    """A DiTTransformer2DModel of `diffusers` of a config's sizes, set up as the paper's own code, in evaluation mode.

    Its weights are drawn from N(0, 0.05) by torch's global generator: a fresh model predicts 0, which proves nothing.
    """
    from diffusers import DiTTransformer2DModel  # here, for it takes seconds

    model = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels * (2 if config.learn_sigma else 1),
        num_layers=config.depth,
        sample_size=config.image_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    for block in model.transformer_blocks:  # each embeds t and y anew, with equal weights in published models
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


class Step:
    """A batch for a network of a config's sizes, and what is timed on it; networks are ours or `diffusers`' own."""

    def __init__(self, config: Config, batch_size: int, device: torch.device):
        size, out_channels = config.image_size, config.in_channels * (2 if config.learn_sigma else 1)
        self.x = torch.randn(batch_size, config.in_channels, size, size, device=device)
        self.target = torch.randn(batch_size, out_channels, size, size, device=device)
        self.t = torch.randint(1000, (batch_size,), device=device)
        self.y = torch.randint(config.num_classes, (batch_size,), device=device)

    def predict(self, network: Callable, precision: str) -> Tensor:
        """The network's output (B, C or 2C, H, W)."""
        # Every weight is used once a pass: to keep its bf16 copy until the end would only take memory.
        with torch.autocast(self.x.device.type, torch.bfloat16, precision == "bf16", cache_enabled=False):
            out = network(self.x, self.t, self.y)
        return out if isinstance(out, Tensor) else out.sample  # diffusers wraps it in an object

    def forward(self, network: Callable, precision: str) -> Tensor:
        with torch.no_grad():
            return self.predict(network, precision)

    def loss(self, network: Callable, precision: str) -> Tensor:
        return F.mse_loss(self.predict(network, precision).float(), self.target)

    def train(self, network: Callable, precision: str, optimizer: torch.optim.Optimizer) -> None:
        self.loss(network, precision).backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every training step here."""
    return torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, fused=True)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """|out - reference| / |reference|."""
    return ((out - reference).norm() / reference.norm()).item()


def time_in_turn(calls: dict[Any, Callable], repeats: int, device: torch.device) -> dict[Any, list[float]]:
    """Seconds of each call, a figure a round; each round takes a sample of every call in turn."""
    counts = {}
    for name, call in calls.items():
        seconds_of(call, 2, device)  # compiles, and warms up
        counts[name] = max(2, math.ceil(SAMPLE_SECONDS / seconds_of(call, 2, device)))
    samples = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            samples[name].append(seconds_of(call, counts[name], device))
    return samples


def paired_ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """How many times faster ours is: median, least and most of the ratios of the same round."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def resident(field: str) -> int:
    """Bytes of this process in memory, on Linux: VmRSS is now, VmHWM the most since the mark was reset."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def memory_now(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else resident("VmRSS")


def peak_memory(device: torch.device, call: Callable) -> int:
    """The most bytes in use during a call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    call()
    return resident("VmHWM")


def measure_memory(config: Config, mode: str, batch_size: int, device: torch.device, precision: str) -> dict[str, int]:
    """Bytes of one forward pass or of training steps, eager; for a process that has done nothing before."""
    first = DiT(hidden_size=16, depth=1).to(device)
    Step(Config(image_size=28), 1, device).train(first, precision, adamw(first))  # loads the libraries
    del first
    start = memory_now(device)
    model = build_model(config).to(device).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    step = Step(config, batch_size, device)
    if mode == "forward":
        return {"weights": weights, "forward peak": peak_memory(device, lambda: step.forward(model, precision)) - start}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    before = memory_now(device)
    activations = peak_memory(device, lambda: step.loss(model, precision).backward()) - before
    optimizer = adamw(model)
    optimizer.step()
    optimizer.zero_grad()
    peak = peak_memory(device, lambda: step.train(model, precision, optimizer)) - start
    kind = "checkpointed" if config.activation_checkpointing else "training"
    return {f"{kind} activations": activations, f"{kind} peak": peak}


def memory_report(config: Config, modes: list[str], batch_size: int, *where: Any) -> dict[str, int]:
    """Bytes by name, each job in a fresh process on `where` (device, precision); what cannot be measured is absent."""
    jobs = [(config, "forward", 1)] if "forward" in modes else []
    if "training" in modes:
        saving = config.replace(activation_checkpointing=True)
        jobs += [(config, "training", batch_size), (saving, "training", batch_size)]
    report = {}
    for job in jobs:
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                report |= pool.submit(measure_memory, *job, *where).result()
        except (OSError, BrokenProcessPool, torch.OutOfMemoryError):  # not Linux, or not enough memory
            continue
    return report


def measure_speed(variants: dict[str, dict], mode: str, step: Step, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds a call, network by network and variant by variant, a figure a round."""
    optimizers = (
        {name: adamw(network) for name, network in variants["eager fp32"].items()} if mode == "training" else {}
    )
    calls = {}
    for variant, networks in variants.items():
        for name, network in networks.items():
            arguments = (network, variant.split()[1])
            if mode == "training":
                calls[name, variant] = partial(step.train, *arguments, optimizers[name])
            else:
                calls[name, variant] = partial(step.forward, *arguments)
    samples = time_in_turn(calls, repeats, step.x.device)
    return {name: {variant: samples[name, variant] for variant in variants} for name in variants["eager fp32"]}


def compare(seconds: dict[str, dict[str, list[float]]]) -> list[dict]:
    """The ratios at equal precision and equal compilation, then of our default to `diffusers` as it comes."""
    ours, theirs = seconds["ours"], seconds["diffusers"]
    pairs = [(variant, variant) for variant in ours]
    if len(ours) > 1:
        pairs.append((list(ours)[-1], "eager fp32"))
    return [{"ours": a, "diffusers": b, **paired_ratio(theirs[b], ours[a])} for a, b in pairs]


def measure_model(
    config: Config, modes: list[str], batch_size: int, device: torch.device, peaks: dict, compiling: bool, repeats: int
) -> dict:
    """All that the tables say of a model, but for its memory; peaks are the machine's FLOP/s at each precision."""
    torch.compiler.reset()  # else it would compile for the shapes of all models so far
    torch.manual_seed(0)
    with torch.device("meta"):
        gflops = count_gflops(build_model(config))
    model = build_model(config).to(device).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = {"parameters": parameters, "gflops": gflops, "batch_size": batch_size, "speed": {}}
    networks, step = {"ours": model}, Step(config, batch_size, device)
    if find_spec("diffusers"):
        networks["diffusers"] = diffusers_dit(config).to(device)
        model.load_state_dict(from_diffusers(networks["diffusers"].state_dict(), config.image_size))
        report["relative_error"] = relative_error(*(step.forward(network, "fp32") for network in networks.values()))
    variants = {f"eager {precision}": networks for precision in peaks}  # the last of all is our default
    if compiling:
        default = list(peaks)[-1]

        def loss_of(network: Callable) -> Tensor:
            return step.loss(network, default)

        compiled = {name: compile_network(network, loss_of) for name, network in networks.items()}
        if all(compiled[name] is not networks[name] for name in networks):  # it worked
            variants[f"compiled {default}"] = compiled
    for mode in modes:
        seconds = measure_speed(variants, mode, step, repeats)
        speed = {
            name: {variant: batch_size / statistics.median(s) for variant, s in runs.items()}
            for name, runs in seconds.items()
        }
        flop = 2e9 * gflops * (3 if mode == "training" else 1)
        shares = {variant: flop * rate / peaks[variant.split()[1]] for variant, rate in speed["ours"].items()}
        report["speed"][mode] = {"images_per_second": speed, "share_of_peak": shares, "seconds": seconds}
        if len(networks) > 1:
            report["speed"][mode]["ratios"] = compare(seconds)
    return report


def print_rows(rows: list[dict[str, str]]) -> None:
    """Rows of the same columns, aligned; Markdown too. A row may lack a column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([row.get(name, "-") for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)) + " |" for line in cells]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    print("", lines[0], rule, *lines[1:], sep="\n")


def print_report(report: dict) -> None:
    """The machine, then the tables: speed, memory, and the ratios to `diffusers`."""
    machine = report["machine"]
    peaks = ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {precision}" for precision, peak in machine["peaks"].items())
    print(f"\n{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; matrix products: {peaks}")
    speeds, memories, ratios = [], [], []
    for name, model in report["models"].items():
        for mode, speed in model["speed"].items():
            row = {"model": name, "million parameters": f"{model['parameters'] / 1e6:.1f}"}
            row |= {"Gflops": f"{model['gflops']:.2f}", "images/s in": mode, "batch": str(model["batch_size"])}
            row |= {variant: f"{figure:,.1f}" for variant, figure in speed["images_per_second"]["ours"].items()}
            variant, share = list(speed["share_of_peak"].items())[-1]
            speeds.append(row | {f"of peak, {variant}": f"{share:.0%}"})
            row = {"model": name, "speed-up in": mode}
            for ratio in speed.get("ratios", ()):
                variants = dict.fromkeys((ratio["ours"], ratio["diffusers"]))  # one name, where they are the same
                row[" / ".join(variants)] = f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
            ratios.append(row | {"relative error": f"{model.get('relative_error', math.nan):.1e}"})
        memory = {figure: bytes / 1e6 for figure, bytes in model["memory"].items()}
        row = {"model": name} | {f"{figure}, MB": f"{value:,.0f}" for figure, value in memory.items()}
        if "forward peak" in memory:
            row["forward / weights"] = f"{memory['forward peak'] / memory['weights']:.2f}"
        if "checkpointed activations" in memory and memory.get("training activations"):
            row["saved"] = f"{1 - memory['checkpointed activations'] / memory['training activations']:.0%}"
        memories.append(row)
    print_rows(speeds)
    print_rows(memories)
    if machine["diffusers"]:
        print(
            f"\nOurs beside diffusers {machine['diffusers']}: median ratio of {report['repeats']} rounds, least to most"
        )
        print_rows(ratios)
    else:
        print("\nWith `pip install diffusers` its networks of the same sizes are timed in turn with ours.")


def device_name(device: torch.device) -> str:
    """The processor's name, as well as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or a processor that is not described so
        return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Measure the speed and memory of the model's sizes, beside diffusers where it is installed.")
    basics = parser.group("basics")
    basics.add_argument("--models", metavar="NAMES", help="digits or the paper's, with commas (default: by device)")
    basics.add_argument("--modes", metavar="NAMES", help="forward, training (default: forward,training)")
    parser.add_number("--batch-size", "images at a time (default: by the model's tokens)", "basics", most=2**20)
    parser.add_number("--repeats", "rounds of timing (default: 5)", "basics", most=10**6)
    basics.add_argument("--compile", choices=("on", "off"), help="time the networks compiled too (default: on)")
    basics.add_argument("--json", metavar="FILE", help="write all figures there too")
    parser.add_fields("device", "precision", title="machine")
    given = vars(parser.parse_args(argv))
    if "json" in given:
        check_path("--json", given["json"], ".json")
    device = choose_device(given.get("device", "auto"))
    precision = choose_precision(given.get("precision", "auto"), device)
    models = given.get("models", DEFAULT_MODELS.get(device.type, DEFAULT_MODELS["cpu"])).split(",")
    modes, repeats = given.get("modes", ",".join(MODES)).split(","), given.get("repeats", 5)
    configs = {name: size_config(name) for name in models}
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"mode {mode!r} is not one of {', '.join(MODES)}")

    def batch_size(config: Config) -> int:
        tokens = (config.image_size // config.patch_size) ** 2
        return given.get("batch_size", max(1, BATCH_TOKENS.get(device.type, 2048) // tokens))

    for config in configs.values():  # of the weights at least one copy, in training their gradients and moments too
        sizes = config.replace(batch_size=batch_size(config), activation_checkpointing="training" not in modes)
        check_size(sizes, device, copies=4 if "training" in modes else 1)

    machine = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    machine["diffusers"] = version("diffusers") if find_spec("diffusers") else None
    report = {"machine": machine, "repeats": repeats, "models": {}}
    # Memory first, while this process holds none that the measured ones may need.
    memory = {name: memory_report(c, modes, batch_size(c), device, precision) for name, c in configs.items()}
    machine["peaks"] = {name: matmul_peak(device, name) for name in dict.fromkeys(("fp32", precision))}
    for name, config in configs.items():
        print(f"{name}, {batch_size(config)} images", flush=True)
        settings = (device, machine["peaks"], given.get("compile") != "off", repeats)
        try:
            figures = measure_model(config, modes, batch_size(config), *settings)
            report["models"][name] = figures | {"memory": memory[name]}
        except torch.OutOfMemoryError:
            print(f"{name} with {batch_size(config)} images does not fit; left out: try a smaller --batch-size")
    print_report(report)
    if "json" in given:
        save_json(report, given["json"])


if __name__ == "__main__":
    run_script(main)
