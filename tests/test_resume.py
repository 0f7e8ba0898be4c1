"""A run killed with SIGKILL, again and again, ends with the same bits as one never interrupted."""

import os
import random
import signal
import subprocess
import sys
import time

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


def steps_written(out_dir) -> int:
    try:
        return max(0, (out_dir / "loss.csv").read_text().count("\n") - 1)
    except FileNotFoundError:
        return 0


def kill_once(command, out_dir, target, during_write) -> bool:
    """Start, or go on with, the run; SIGKILL it past the target step. True if that cut a checkpoint's write short."""
    for scrap in out_dir.glob("*.tmp"):
        scrap.unlink()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while steps_written(out_dir) < target or not (out_dir / "checkpoint.pth").exists():
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)
    if during_write:
        while not list(out_dir.glob("*.pth.*.tmp")):
            assert process.poll() is None, "the run ended before it was killed"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert load_file(out_dir / "checkpoint.pth")["progress"][0] < STEPS  # inside the run
    return bool(list(out_dir.glob("*.pth.*.tmp")))


def check_kills(tmp_path, glyphs_dir, kills, in_writes):
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print(f"SEED={seed}")
    rng = random.Random(seed)
    flags = [*FLAGS, "--data-dir", glyphs_dir]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("train.py", *flags, "--out-dir", whole).returncode == 0
    # Kills are in the order of their steps, over the whole run; no write is left to be cut after step STEPS - 20.
    kinds = [True] * in_writes + [False] * (kills - in_writes)
    rng.shuffle(kinds)
    targets = sorted(rng.randrange(1, STEPS - 20) for _ in kinds)
    cut_writes = 0
    for target, during_write in zip(targets, kinds):
        hit = False
        for attempt in range(5):  # a write takes milliseconds: a kill may come too late, and another is needed
            resume = ["--resume"] if (cut / "checkpoint.pth").exists() else []
            command = [sys.executable, "train.py", *map(str, flags), "--out-dir", str(cut), *resume]
            hit = kill_once(command, cut, target, during_write)
            if hit or not during_write:
                break
        cut_writes += hit
        print(f"killed past step {target}" + (", in the middle of a write" if hit else ""))
    assert cut_writes >= 3
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
