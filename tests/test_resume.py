"""A run killed with SIGKILL, again and again, ends with the same bits as one never interrupted."""

import os
import random
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run
from test_train import assert_same, without_time

from support.files import load_file

STEPS = 300
FLAGS = [
    "--dataset",
    "glyphs",
    "--train-steps",
    STEPS,
    "--checkpoint-every",
    10,
    "--sample-every",
    70,
    "--log-every",
    1,
]
FLAGS += ["--hidden-size", 64, "--depth", 2, "--batch-size", 16, "--sample-steps", 3, "--compile", "off"]


# A run that kills itself past a step: between two steps, or when a checkpoint is written but has not its name yet.
KILLED = """
import os, pathlib, runpy, signal, sys
import torch

out_dir, target, during_write = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"

def deadly(function):
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        csv = out_dir / "loss.csv"
        if csv.exists() and csv.read_text().count("\\n") > target:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if during_write:
    torch.save = deadly(torch.save)
else:
    torch.nn.utils.clip_grad_norm_ = deadly(torch.nn.utils.clip_grad_norm_)
sys.argv = ["train.py", *sys.argv[4:]]
runpy.run_path("train.py", run_name="__main__")
"""


def kill_once(flags, out_dir, target, during_write) -> None:
    """Start, or go on with, the run; it dies by SIGKILL past the target step."""
    for scrap in out_dir.glob("*.tmp"):
        scrap.unlink()
    command = [sys.executable, "-c", KILLED, out_dir, target, during_write, *flags]
    killed = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert load_file(out_dir / "checkpoint.pth")["progress"][0] < STEPS  # inside the run
    assert bool(list(out_dir.glob("*.tmp"))) == during_write


def check_kills(tmp_path, glyphs_dir, kills, in_writes):
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print(f"SEED={seed}")
    rng = random.Random(seed)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*FLAGS, "--data-dir", glyphs_dir]
    assert run("train.py", *flags, "--out-dir", whole).returncode == 0
    # Kills are in the order of their steps, over the whole run; after step STEPS - 20 there may be no write to cut.
    kinds = [True] * in_writes + [False] * (kills - in_writes)
    rng.shuffle(kinds)
    targets = sorted(rng.randrange(1, STEPS - 20) for _ in kinds)
    for target, during_write in zip(targets, kinds):
        resume = ["--resume"] if (cut / "checkpoint.pth").exists() else []
        kill_once([*flags, "--out-dir", cut, *resume], cut, target, during_write)
        print(f"killed past step {target}" + (", in the middle of a write" if during_write else ""))
    result = run("train.py", "--resume", "--out-dir", cut)
    assert result.returncode == 0, result.stderr
    a, b = load_file(whole / "checkpoint.pth"), load_file(cut / "checkpoint.pth")
    for key in ("model", "ema", "optimizers"):
        assert_same(a[key], b[key])
    assert without_time(whole) == without_time(cut) and len(without_time(whole)) == STEPS
    for name in ("model.pth", f"samples/step_{STEPS:07d}.png"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_four_kills(tmp_path, glyphs_dir):
    check_kills(tmp_path, glyphs_dir, kills=4, in_writes=3)


@pytest.mark.long
def test_twenty_kills(tmp_path, glyphs_dir):
    check_kills(tmp_path, glyphs_dir, kills=20, in_writes=6)
