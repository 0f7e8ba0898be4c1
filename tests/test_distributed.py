"""Several processes train as one does: on the same numbers, to the same losses; and they end in order.

This file is also what torchrun runs in the tests (see __main__): each start takes seconds, so that few have to do.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import assert_same

import dataset
import train
from config import preset
from dataset import Dataset
from diffusion import Diffusion
from support import checkpoint, distributed, run_state
from support.checkpoint import build_process
from support.command_line import run_script
from support.errors import UserError
from support.files import load_file
from support.machine import choose_device
from support.run_log import RunLog

TINY = dict(dataset="random", patch_size=4, hidden_size=16, depth=1, num_heads=2, batch_size=16, warmup_steps=5)
TINY |= dict(optimizer="adamw", learning_rate=1e-3, sample_steps=2, device="cpu", precision="fp32", compile="off")
FLOW = dict(process="flow_matching", sampler="euler", sample_steps=2, block="in-context", flip=True, train_steps=10)
PARTS = dict(learn_sigma=True, accumulation_steps=2, activation_checkpointing=True, block="cross-attention")
# What is trained on 1, 2 and 4 processes; one process is told nothing of shards.
CASES = {
    "plain": {},
    "plain shards": dict(shard=True),
    "muon": dict(optimizer="muon", train_steps=10),
    "float64": {},
    "float64 shards": dict(shard=True),
    "flow": FLOW,
    "flow shards": dict(**FLOW, shard=True),
    "parts": dict(**PARTS, train_steps=10),
    "parts shards": dict(**PARTS, train_steps=10, shard=True),
}


def steps() -> int:
    """Of a run that nothing is said of."""
    return int(os.environ["STEPS"])


def random_images(data_dir, train) -> tuple:
    images = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(50) % 4


def watch(patch: pytest.MonkeyPatch) -> dict[str, list]:
    """What a training draws (in its first steps), its first gradient, and each loss, as floats that are not rounded."""
    seen: dict[str, list] = {"drawn": [], "gradient": [], "losses": []}
    draw_batch, clip, add = train.draw_batch, torch.nn.utils.clip_grad_norm_, RunLog.add

    def draw(*args, **kwargs):
        parts = draw_batch(*args, **kwargs)
        if len(seen["drawn"]) < 3:
            seen["drawn"].append([torch.cat(tensors) for tensors in zip(*parts)])
        return parts

    def clip_gradients(parameters, limit):
        parameters = list(parameters)
        if not seen["gradient"]:
            seen["gradient"] = [distributed.full(p.grad).clone() for p in parameters if p.grad is not None]
        return clip(parameters, limit)

    def note(self, step, told, *more):
        seen["losses"].append(told[0].item())
        add(self, step, told, *more)

    patch.setattr(train, "draw_batch", draw)
    patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_gradients)
    patch.setattr(RunLog, "add", note)
    return seen


def at_call(patch: pytest.MonkeyPatch, module, name: str, number: int, act) -> None:
    """Do something after so many calls of a function: add_up amid each step, torch.save amid each write."""
    function, calls = getattr(module, name), []

    def call(*args):
        function(*args)
        calls.append(args)
        if len(calls) == number:
            act()

    patch.setattr(module, name, call)


def fit(folder: Path, name: str, resume: bool = False, stop: bool | None = None, **settings) -> dict[str, list]:
    """Train in folder/name, or go on there; what was seen. If `stop`, this process gets a SIGTERM halfway."""
    out_dir = str(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        if name.startswith("float64"):
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            torch.set_default_dtype(torch.float64)
        if stop:
            at_call(patch, distributed, "add_up", steps() // 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        seen = watch(patch)
        try:
            if resume:
                train.train(*run_state.resumed({"out_dir": out_dir, **settings}))
            else:
                train.train(preset("digits", **{**TINY, "train_steps": steps(), **settings, "out_dir": out_dir}))
        except SystemExit as end:
            assert stop and end.code == 128 + signal.SIGTERM
        finally:
            torch.set_default_dtype(torch.float32)
    return seen


def flags(**settings) -> list[str]:
    settings = {**TINY, "preset": "digits", "train_steps": steps(), **settings}
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


# What this file does when torchrun starts it.


def train_all(folder: Path) -> None:
    """All cases; what others have begun is gone on with, and something begun for others. What is seen goes to files."""
    with distributed.joined():
        rank, count = torch.distributed.get_rank(), distributed.processes()
        for name, settings in CASES.items():
            torch.save(fit(folder, name, **settings), folder / f"{name} {rank}.pt")
        for name in ("half", "half shards") if count == 2 else ():
            torch.save(fit(folder, name, stop=rank == 1, shard="shards" in name), folder / f"{name} {rank}.pt")
        for path in sorted(folder.glob("begun*/")):
            seen = fit(folder, path.name, resume=True, shard="shards" not in path.name)
            torch.save(seen, folder / f"{path.name} {rank}.pt")


def survive(folder: Path) -> None:
    """A run in which a process dies: of each start $KILLS says which, in which step, and whether amid a write."""
    attempt, kills = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), json.loads(os.environ["KILLS"])
    rank, number, writing = kills[attempt] if attempt < len(kills) else (None, 0, False)

    def die() -> None:
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == str(rank):
            if writing:
                at_call(patch, torch, "save", number, die)
            else:
                at_call(patch, distributed, "add_up", number, die)
        more = ["--resume"] if os.environ.get("RESUME") else flags(checkpoint_every=7, log_every=1)
        run_script(lambda: train.main([*more, f"--out-dir={folder / 'run'}"]))


def fail(folder: Path) -> None:
    """A mistake a start: folders not shared, a batch that does not divide, data and compilers that differ, a NaN."""
    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    with pytest.MonkeyPatch.context() as patch:
        if attempt == "0":
            (folder / rank).mkdir()
            os.chdir(folder / rank)
            run_script(lambda: train.main(flags(out_dir="run")))
        if attempt == "1":
            run_script(lambda: train.main(flags(out_dir=folder / "odd", batch_size=15)))
        if attempt == "2":
            if rank == "1":
                patch.setitem(
                    dataset.DATASETS, "random", lambda *args: (255 - random_images(*args)[0], torch.arange(50) % 4)
                )
            run_script(lambda: train.main(flags(out_dir=folder / "other")))
        if attempt == "3":

            def compile_somewhere(model):
                return model if rank == "0" else lambda *args: 1 / 0

            patch.setattr(torch, "compile", compile_somewhere)
            run_script(lambda: train.main([*flags(out_dir=folder / "compiled", compile="on"), "--shard"]))
        if rank == "1":
            loss = Diffusion.loss
            patch.setattr(Diffusion, "loss", lambda *args, **kwargs: loss(*args, **kwargs) * float("nan"))
        run_script(lambda: train.main(flags(out_dir=folder / "nan")))


def end_in_order(folder: Path) -> None:
    """A run that takes a second signal while it writes."""
    save = run_state.save_file

    def save_and_again(content, path):
        if content.get("progress", [0])[0]:  # not the first checkpoint, before which a signal acts at once
            os.kill(os.getpid(), signal.SIGTERM)
        save(content, path)

    def leave(code: int, leave=os._exit) -> None:
        (folder / f"{os.environ['RANK']} ended").touch()
        leave(code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_state, "save_file", save_and_again)
        patch.setattr(os, "_exit", leave)
        run_script(
            lambda: train.main(flags(out_dir=folder / "run", train_steps=10**6, log_every=1, checkpoint_every=10**6))
        )


def command(processes: int, work, folder: Path, *options: object) -> list[str]:
    options = ("--nproc-per-node", processes, "--master-port", random.randrange(20_000, 60_000), *options)
    return list(map(str, [sys.executable, "-m", "torch.distributed.run", *options, __file__, work.__name__, folder]))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(processes: int, work, folder: Path, *options: object) -> subprocess.CompletedProcess:
    """This file's work on so many processes."""
    folder.mkdir(exist_ok=True)
    words = command(processes, work, folder, *options)
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600)


def errors(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


# The tests.


@pytest.fixture(scope="module", autouse=True, params=[30, pytest.param(200, marks=pytest.mark.long)])
def length(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPS", str(request.param))
        yield


@pytest.fixture(scope="module")
def trained(length, tmp_path_factory) -> dict[int, Path]:
    """The folders of all that was trained on 1, 2 and 4 processes."""
    folders = {count: tmp_path_factory.mktemp(f"on{count}") for count in (1, 2, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dataset.DATASETS, "random", random_images)
        for name, settings in CASES.items():
            if "shards" not in name:
                torch.save(fit(folders[1], name, **settings), folders[1] / f"{name} 0.pt")
        torch.save(fit(folders[1], "half", stop=True), folders[1] / "half 0.pt")
        shutil.copytree(folders[1] / "half", folders[2] / "begun on 1")
        for count in (2, 4):
            result = torchrun(count, train_all, folders[count])
            assert result.returncode == 0, result.stderr
            for name in ("half", "half shards"):
                if count == 2:
                    for other in (1, 4):
                        shutil.copytree(folders[2] / name, folders[other] / name.replace("half", "begun on 2"))
        for name in ("begun on 2", "begun on 2 shards"):
            torch.save(fit(folders[1], name, resume=True), folders[1] / f"{name} 0.pt")
    return folders


def seen(folder: Path, name: str) -> list[dict[str, list]]:
    """What each process has seen."""
    return [torch.load(folder / f"{name} {rank}.pt") for rank in range(len(list(folder.glob(f"{name} ?.pt"))))]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_n_processes_train_as_one_does(trained, name, count):
    (one,), many = seen(trained[1], name.removesuffix(" shards")), seen(trained[count], name)
    assert len(many) == count
    for step, whole in enumerate(one["drawn"]):
        for i, tensor in enumerate(whole):
            assert torch.equal(tensor, torch.cat([part["drawn"][step][i] for part in many]))
    wide, narrow = (1e-9, 1e-9) if name.startswith("float64") else (1e-5, 1e-6)
    whole = torch.cat([gradient.flatten() for gradient in one["gradient"]])
    for part in many:
        gradient = torch.cat([gradient.flatten() for gradient in part["gradient"]])
        assert (gradient - whole).norm() <= narrow * whole.norm()
        assert part["losses"] == pytest.approx(one["losses"], rel=wide, abs=0)
        assert part["losses"] == many[0]["losses"] and len(part["losses"]) == len(one["losses"])
    assert_close(trained[1] / name.removesuffix(" shards"), trained[count] / name)


def assert_close(a: Path, b: Path) -> None:
    """The same weights but for rounding, which Adam makes more of where a gradient is near 0."""
    a, b = (load_file(folder / "checkpoint.pth")["model"] for folder in (a, b))
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-3 * a[name].norm() + 1e-6, name


def test_a_signal_to_one_process_stops_all_after_the_same_step(trained):
    for name in ("half", "half shards"):
        (step,) = {len(part["losses"]) for part in seen(trained[2], name)}
        assert steps() // 2 <= step < steps()
        assert load_file(trained[2] / name / "checkpoint.pth")["progress"][0] == step


@pytest.mark.parametrize(
    "begun, count, name",
    [(1, 2, "begun on 1"), (2, 4, "begun on 2"), (2, 4, "begun on 2 shards"), (2, 1, "begun on 2")]
    + [(2, 1, "begun on 2 shards")],
)
def test_a_run_goes_on_with_other_processes_in_shards_and_back(trained, begun, count, name):
    (whole,) = seen(trained[1], "plain")
    before = seen(trained[begun], name.replace(f"begun on {begun}", "half"))[0]["losses"]
    after = seen(trained[count], name)[0]["losses"]
    assert before + after == pytest.approx(whole["losses"], rel=1e-5, abs=0)
    assert_close(trained[1] / "plain", trained[count] / name)


def assert_same_end(a: Path, b: Path) -> None:
    a, b = (load_file(folder / "checkpoint.pth") for folder in (a, b))
    for key in ("model", "ema", "optimizers"):
        assert_same(a[key], b[key])


def test_killed_processes_are_started_again_and_end_with_the_same_bits(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("KILLS", "[[1, 16, false], [0, 3, true]]")
    # torchrun looks only every few seconds, or it might end the other process, too, before that has told.
    result = torchrun(2, survive, tmp_path, "--max-restarts", 2, "--monitor-interval", 3)
    assert result.returncode == 0, result.stderr
    assert len(errors(result)) == 2 and all("another process of this run has gone" in line for line in errors(result))
    assert_same_end(trained[2] / "plain", tmp_path / "run")
    assert not list(tmp_path.rglob("*.tmp"))
    # Another launch is no restart of this one: it is refused, at its first start and at its second.
    result = torchrun(2, survive, tmp_path, "--max-restarts", 1)
    assert result.returncode != 0 and len(errors(result)) == 2
    assert all("checkpoint.pth is there already; go on with --resume" in line for line in errors(result))


@pytest.mark.long
def test_two_machines_start_again_together(trained, tmp_path, monkeypatch):
    """Two agents of torchrun, as on two machines, of which only one counts the restart."""
    monkeypatch.setenv("KILLS", "[[1, 16, false]]")
    meeting = f"localhost:{random.randrange(20_000, 60_000)}"
    several = ("--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting, "--local-addr", "localhost")
    words = command(1, survive, tmp_path, *several, "--max-restarts", 2)
    agents = [subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        told = [agent.communicate(timeout=240)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], told
    assert_same_end(trained[2] / "plain", tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("numbers", [[2], [1, 2, 4]])
def test_ten_kills(numbers, trained, tmp_path, monkeypatch):
    if steps() < 200:
        pytest.skip("ten kills, some of them after twenty steps, take more steps than these")
    seed = int(os.environ.get("SEED", 3320))
    print(f"SEED={seed}")
    rng, checkpoint = random.Random(seed), tmp_path / "run" / "checkpoint.pth"
    for kill in range(10):
        count, writing = rng.choice(numbers), rng.random() < 0.3
        rank = 0 if writing else rng.randrange(count)
        monkeypatch.setenv("KILLS", json.dumps([[rank, rng.randint(1, 3) if writing else rng.randint(1, 20), writing]]))
        monkeypatch.setenv("RESUME", "yes" if checkpoint.exists() else "")
        before = load_file(checkpoint)["progress"][0] if checkpoint.exists() else 0
        result = torchrun(count, survive, tmp_path)
        assert result.returncode != 0
        seconds = time.time() - (tmp_path / "killed").stat().st_mtime
        after = load_file(checkpoint)["progress"][0] if checkpoint.exists() else 0
        where = "in a write" if writing else "in a step"
        print(f"process {rank} of {count} killed {where}: {before} -> {after}; all had gone after {seconds:.0f} s")
        assert before <= after < steps()
    monkeypatch.setenv("KILLS", "[]")
    monkeypatch.setenv("RESUME", "yes")
    assert torchrun(2, survive, tmp_path).returncode == 0
    if numbers == [2]:
        assert_same_end(trained[2] / "plain", tmp_path / "run")
    else:
        assert_close(trained[1] / "plain", tmp_path / "run")
        (whole,), rows = seen(trained[1], "plain"), (tmp_path / "run" / "loss.csv").read_text().splitlines()[1:]
        assert [float(row.split(",")[1]) for row in rows] == pytest.approx(whole["losses"], rel=1e-5, abs=5.1e-7)


def test_a_mistake_is_told_once(tmp_path):
    result = torchrun(2, fail, tmp_path, "--max-restarts", 4)
    assert result.returncode != 0
    shared, odd, other, compiled, nan = errors(result)
    assert "run is not the same folder in all processes; give an --out-dir that they share" in shared
    assert "batch_size 15 is not divisible by 2 processes times accumulation_steps 1; try 16" in odd
    assert "the processes have read different data; have all machines hold the same in --data-dir" in other
    assert "compiling failed on one of the processes (ZeroDivisionError); give --compile off" in compiled
    assert "the loss is nan, its gradient's norm nan at step 1; " in nan
    assert load_file(tmp_path / "nan" / "checkpoint.pth")["progress"][0] == 0


def test_a_signal_to_torchrun_ends_all_in_order(tmp_path):
    words = command(2, end_in_order, tmp_path)
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "loss.csv"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert "stopped at step" in out and "error:" not in err, err
    assert load_file(tmp_path / "run" / "checkpoint.pth")["progress"][0] >= 3
    assert {path.name for path in tmp_path.glob("*ended")} == {"0 ended", "1 ended"}


@pytest.mark.parametrize("process", ["diffusion", "flow_matching"])
@pytest.mark.parametrize("latents", [None, dict(scale=0.5, shift=0.1, deviation=True)])
def test_the_parts_of_a_batch_are_the_batch(latents, process):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (100, 4, 8, 8), dtype=torch.uint8, generator=generator)
    images = images.half() / 100 if latents else images
    data = Dataset("random", images, torch.arange(50) % 4, (8, 8), latents=latents)
    config = preset("digits", batch_size=24, accumulation_steps=2, flip=True, process=process)
    draw = partial(train.draw_batch, data, build_process(config), config, 3)
    whole = [torch.cat(tensors) for tensors in zip(*draw())]
    for count in (2, 4):
        size = 24 // count
        parts = [part for rank in range(count) for part in draw(part=slice(rank * size, (rank + 1) * size))]
        assert len(parts) == 2 * count
        for tensor, of_parts in zip(whole, zip(*parts)):
            assert torch.equal(tensor, torch.cat(of_parts))


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--shard is for several processes: torchrun --nproc-per-node N train.py"):
        distributed.own_part(preset("digits", shard=True, optimizer="adamw"))
    with pytest.raises(UserError, match="shard does not go with optimizer muon"):
        preset("digits", shard=True, optimizer="muon")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda", 1) and chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="3 processes are more than the 2 GPUs here; give --nproc-per-node 2"):
        choose_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")


def test_several_processes_need_less_memory_each(monkeypatch):
    needed = []
    monkeypatch.setattr(checkpoint, "check_memory", lambda size, *_: needed.append(size))
    config = preset("digits", batch_size=64, image_size=28, optimizer="adamw")
    for count, shard in ((1, False), (4, False), (4, True)):
        monkeypatch.setattr(checkpoint, "processes", lambda count=count: count)
        checkpoint.check_size(config.replace(shard=shard), torch.device("cpu"))
    one, four, shards = needed
    states = 4 * 5 * sum(parameter.numel() for parameter in checkpoint.empty_model(config).parameters())
    assert four - states == (one - states) / 4 and shards == one / 4


if __name__ == "__main__":
    dataset.DATASETS["random"] = random_images
    run_script(lambda: globals()[sys.argv[1]](Path(sys.argv[2])))
