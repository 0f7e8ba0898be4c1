"""A run killed with SIGKILL, disturbed, or gone on with elsewhere, ends with the same bits as one left alone."""

import os
import random
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run
from test_train import assert_same, blobs, fit, without_time  # noqa: F401  blobs is a fixture for each test

import dataset
import train
from support import run_state
from support.command_line import run_script
from support.errors import UserError
from support.files import load_file, save_file

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
    seed = int(os.environ.get("SEED", 3320))
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
    assert not list(cut.rglob("*.tmp"))


def test_four_kills(tmp_path, glyphs_dir):
    check_kills(tmp_path, glyphs_dir, kills=4, in_writes=3)


@pytest.mark.long
def test_twenty_kills(tmp_path, glyphs_dir):
    check_kills(tmp_path, glyphs_dir, kills=20, in_writes=6)


def go_on(folder, *flags):
    train.main(["--resume", "--out-dir", str(folder), *map(str, flags)])


def test_a_run_is_not_harmed_by_others_in_its_folder(tmp_path, monkeypatch):
    pytest.importorskip("fcntl", reason="locks are of Unix")
    flags = ["--train-steps", 20, "--checkpoint-every", 4, "--sample-every", 8]
    fit(tmp_path / "alone", *flags)
    disturbed = tmp_path / "disturbed"
    update_ema, steps = train.update_ema, []

    def disturb(*arguments):
        steps.append(update_ema(*arguments))
        if len(steps) == 10:
            before = {path: path.read_bytes() for path in disturbed.rglob("*") if path.is_file()}
            with pytest.raises(UserError, match="is in use by another run; wait for its end, or give another --out-d"):
                go_on(disturbed)
            with pytest.raises(UserError, match="checkpoint.pth is there already; go on with --resume"):
                fit(disturbed, *flags)
            with monkeypatch.context() as patch:  # one that began before there was a checkpoint
                patch.setattr(run_state, "refuse_trained", lambda folder: None)
                with pytest.raises(UserError, match="is in use by another run"):
                    fit(disturbed, *flags)
            assert before == {path: path.read_bytes() for path in disturbed.rglob("*") if path.is_file()}

    monkeypatch.setattr(train, "update_ema", disturb)
    fit(disturbed, *flags)
    assert len(steps) == 20
    for name in ("model.pth", "samples/step_0000008.png", "samples/step_0000020.png"):
        assert (tmp_path / "alone" / name).read_bytes() == (disturbed / name).read_bytes()
    a, b = (load_file(tmp_path / name / "checkpoint.pth") for name in ("alone", "disturbed"))
    for key in ("model", "ema", "optimizers"):
        assert_same(a[key], b[key])
    assert without_time(tmp_path / "alone") == without_time(disturbed)
    go_on(disturbed)  # the lock is open again


def test_other_conditions_are_told_once_and_the_run_goes_on(tmp_path, capsys):
    flags = ["--lr-decay", "constant"]
    fit(tmp_path, "--train-steps", 5, *flags)
    state = load_file(tmp_path / "checkpoint.pth")
    now = state["made_with"]
    state["made_with"] = {"threads": now["threads"] + 3, "torch": "1.0", "device": "cuda"}
    save_file(state, tmp_path / "checkpoint.pth")
    capsys.readouterr()
    go_on(tmp_path, "--train-steps", 10)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    then = f"threads {now['threads'] + 3}, now {now['threads']}; torch '1.0', now '{now['torch']}'; device 'cuda', now"
    assert len(notes) == 1 and then in notes[0], notes
    assert load_file(tmp_path / "checkpoint.pth")["progress"][0] == 10
    go_on(tmp_path, "--train-steps", 15)
    assert "note:" not in capsys.readouterr().err


def test_the_data_are_where_today_says_else_where_they_were(tmp_path, monkeypatch):
    asked = []
    load_blobs = dataset.DATASETS["blobs"]
    monkeypatch.setitem(
        dataset.DATASETS, "blobs", lambda folder, train: asked.append(str(folder)) or load_blobs(folder, train)
    )
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("DATA_DIR", raising=False)
    flags = ["--train-steps", 1]
    fit("of_a_flag", *flags, "--data-dir", "data")  # both folders are relative to where one stands
    fit("of_none", *flags)
    monkeypatch.setenv("DATA_DIR", "then")
    fit("of_the_environment", *flags)
    monkeypatch.delenv("DATA_DIR")
    assert asked == ["data", str(ROOT / "data"), "then"]

    monkeypatch.chdir(tmp_path / "there")
    asked.clear()
    for name in ("of_a_flag", "of_none", "of_the_environment"):
        go_on(f"../here/{name}")
    assert asked == [str(tmp_path / "here" / "data"), str(ROOT / "data"), str(tmp_path / "here" / "then")]
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setenv("DATA_DIR", "/today")
        go_on("../here/of_a_flag", "--data-dir", "/a/flag's")
        go_on("../here/of_a_flag")
    go_on("../here/of_a_flag")
    assert asked == ["/a/flag's", "/today", "/today"]

    path = tmp_path / "here" / "of_none" / "checkpoint.pth"
    state = load_file(path)
    state["config"]["data_dir"] = "data"  # earlier versions kept the default as it was, relative to the repository
    save_file(state, path)
    go_on(path.parent)
    assert asked[-1] == str(ROOT / "data")


def test_data_of_another_kind_are_told_by_name(tmp_path, monkeypatch):
    images, labels = dataset.DATASETS["blobs"]("", True)
    monkeypatch.setitem(dataset.DATASETS, "blobs", lambda folder, train: (images, labels, list("abcd")))
    fit(tmp_path, "--train-steps", 1)
    for name, other in (
        ("in_channels of its data was 1, now it is 3", (images.expand(-1, 3, -1, -1), labels)),
        ("num_classes of its data was 4, now it is 2", (images, labels % 2)),
        (r"class_names of its data was .*'c', 'd'\), now it is .*'c', 'e'\)", (images, labels, list("abce"))),
    ):
        monkeypatch.setitem(dataset.DATASETS, "blobs", lambda folder, train, other=other: other)
        with pytest.raises(UserError, match=f"checkpoint.pth: {name}; name its --data-dir"):
            go_on(tmp_path)


def test_fewer_steps_than_there_were_are_refused(tmp_path):
    fit(tmp_path, "--train-steps", 10, "--lr-decay", "constant")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(UserError, match="--train-steps 9: the run has taken 10 already; give at least as many"):
        go_on(tmp_path, "--train-steps", 9)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    go_on(tmp_path, "--train-steps", 10)


def assert_finite(folder):
    """The weights of a run that stopped are those of before, all finite."""
    state = load_file(folder / "checkpoint.pth")
    for weights in (state["model"], state["ema"], load_file(folder / "model.pth")["model"]):
        assert all(tensor.isfinite().all() for tensor in weights.values())
    return state["progress"][0]


@pytest.mark.parametrize("flags", [["--train-steps", 1], ["--train-steps", 3, "--checkpoint-every", 1]])
def test_weights_that_are_not_finite_are_never_written(flags, tmp_path, capsys):
    flags = [*flags, "--learning-rate", 1e39, "--warmup-steps", 0]
    with pytest.raises(SystemExit):
        run_script(lambda: fit(tmp_path / "run", *flags))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith("error: the weights are not finite at step 1; ")
    assert assert_finite(tmp_path / "run") == 0


def test_the_advice_after_a_loss_that_is_not_finite_can_be_followed(tmp_path):
    run_dir = tmp_path / "run"
    flags = ["--train-steps", 50, "--grad-clip", 1e30]
    with pytest.raises(UserError) as error:
        fit(run_dir, *flags, "--learning-rate", 1e30)
    advice = f"{run_dir}/checkpoint.pth is from before; begin anew with a smaller --learning-rate and --out-dir NEW"
    assert advice in str(error.value)
    assert_finite(run_dir)
    fit(tmp_path / "new", *flags, "--learning-rate", 1e-3)
    assert assert_finite(tmp_path / "new") == 50


def test_a_folder_with_trained_weights_is_refused_and_one_with_other_leftovers_is_not(tmp_path):
    for name, message in (
        ("model.pth", f"{tmp_path / 'model.pth'} is there already; give another --out-dir"),
        ("checkpoint.pth", f"{tmp_path / 'checkpoint.pth'} is there already; go on with --resume, or give another"),
    ):
        (tmp_path / name).write_text("trained for weeks")
        with pytest.raises(UserError) as error:
            fit(tmp_path, "--train-steps", 1)
        assert str(error.value).startswith(message)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_text() == "trained for weeks"
        (tmp_path / name).unlink()
    (tmp_path / "samples").mkdir()
    leftovers = ["loss.csv", "loss.png", "samples/step_0000001.png"]
    for name in leftovers:
        (tmp_path / name).write_text("old")
    fit(tmp_path, "--train-steps", 1)
    assert all((tmp_path / name).read_bytes() != b"old" for name in leftovers)
