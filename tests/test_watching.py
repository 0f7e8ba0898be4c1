import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import train
from support import speed, watching
from support.errors import UserError
from support.files import load_file
from support.watching import LABELS, tables_of

TINY = "--dataset glyphs --patch-size 14 --hidden-size 32 --depth 1 --num-heads 2 --batch-size 8 --log-every 2"
TINY += " --warmup-steps 5 --sample-steps 2 --device cpu --precision fp32 --lr-decay constant"


@pytest.fixture
def fit(glyphs_dir, tmp_path, monkeypatch):
    """train.py, in a folder of its own; the peak is measured on small matrices."""
    monkeypatch.setattr(speed, "MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr(speed, "PEAK_SECONDS", 0.001)

    def fit(name, *flags):
        folder = ["--data-dir", str(glyphs_dir), "--out-dir", str(tmp_path / name)]
        train.main([*TINY.split(), *folder, *map(str, flags)])
        return tmp_path / name

    return fit


@pytest.mark.parametrize("steps, profiled", [(1, 1), (3, 2), (12, 5)])
def test_a_profile_of_a_few_steps_leaves_a_trace_and_two_tables(steps, profiled, fit, capsys):
    run = fit("run", "--train-steps", steps, "--profile")
    names = [event.get("name", "") for event in json.loads((run / "trace.json").read_text())["traceEvents"]]
    assert len([name for name in names if name.startswith("ProfilerStep#")]) == profiled
    assert {"data", "noise", "clipping", "average", "waiting for others", "aten::addmm"} <= set(names)
    printed = capsys.readouterr().out
    assert f"\n{profiled} steps of " in printed and "trace.json" in printed
    for name in ("network, and all else", *LABELS, "aten::"):
        assert f"\n{name}" in printed
    part, operator = printed.index("a part of a step"), printed.index("an operator")
    shares = [float(line.split()[-1][:-1]) for line in printed[part:operator].splitlines()[1:] if line]
    assert len(shares) == 7 and sum(shares) == pytest.approx(100, abs=0.5) and min(shares) >= 0
    assert len(printed[operator:].split("\n\n")[0].splitlines()) == 1 + watching.DEAREST


def test_watching_a_run_changes_neither_its_weights_nor_its_file(fit):
    plain, watched = fit("plain", "--train-steps", 8), fit("watched", "--train-steps", 8, "--profile", "--tensorboard")
    assert (plain / "model.pth").read_bytes() == (watched / "model.pth").read_bytes()
    states = [load_file(run / "checkpoint.pth")["model"] for run in (plain, watched)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_on_a_gpu_the_times_are_its_own():
    def event(key, cpu, device, own, kind=DeviceType.CPU):
        times = dict(cpu_time_total=cpu, device_time_total=device, self_cpu_time_total=cpu, self_device_time_total=own)
        return SimpleNamespace(key=key, count=2, device_type=kind, **times)

    events = [event("ProfilerStep*", 20_000, 0, 0), event("data", 300, 2000, 0), event("noise", 100, 500, 0)]
    events += [event("aten::mm", 700, 9000, 9000), event("aten::add", 900, 1000, 1000)]
    events += [
        event("Optimizer.step#AdamW.step", 50, 1200, 0),
        event("Optimizer.zero_grad#AdamW.zero_grad", 50, 300, 0),
    ]
    events += [event("gemm", 0, 9000, 9000, DeviceType.CUDA), event("data", 0, 2000, 2000, DeviceType.CUDA)]
    lines = [line.split() for line in tables_of(events)]
    assert "2 steps of 10.00 ms, the GPU at work 50% of it".split() in lines
    for row in ("network, and all else 3.25 65.0%", "data 0.75 15.0%", "noise 0.25 5.0%", "optimizer 0.75 15.0%"):
        assert row.split() in lines
    assert lines[-3:] == ["aten::mm 4.50 90.0%".split(), "aten::add 0.50 10.0%".split(), []]


def test_a_run_that_ends_amid_the_first_profiled_step_has_no_tables():
    assert tables_of([]) == []


def test_tensorboard_is_shown_what_loss_csv_says_and_the_samples(fit, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(watching, "matmul_peak", lambda device, precision: 1e9)
    run = fit("run", "--train-steps", 8, "--sample-every", 4, "--tensorboard")
    fit("run", "--resume", "--train-steps", 10, "--tensorboard")
    shown = events.EventAccumulator(str(run)).Reload()
    rows = [line.split(",") for line in (run / "loss.csv").read_text().splitlines()[1:]]
    for name, column in (("loss", 1), ("learning rate", 2), ("images per second", 3)):
        scalars = shown.Scalars(name)
        assert [scalar.step for scalar in scalars] == [2, 4, 6, 8, 10]
        assert [s.value for s in scalars] == pytest.approx([float(row[column]) for row in rows], rel=1e-2)
    assert all(scalar.value > 0 for scalar in shown.Scalars("gradient norm"))
    share = [scalar.value for scalar in shown.Scalars("share of matmul peak")]
    speeds = [scalar.value for scalar in shown.Scalars("images per second")]
    model = train.build_model(train.Config(image_size=28, patch_size=14, hidden_size=32, depth=1, num_heads=2))
    assert share == pytest.approx([6e9 * speed.count_gflops(model) * rate / 1e9 for rate in speeds])
    assert [image.step for image in shown.Images("samples")] == [4, 8, 10]


def test_what_was_shown_of_steps_that_are_taken_again_is_hidden(fit):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = fit("run", "--train-steps", 4, "--tensorboard")
    before = (run / "checkpoint.pth").read_bytes()
    fit("run", "--resume", "--train-steps", 8)
    (run / "checkpoint.pth").write_bytes(before)  # as if it had been killed at step 8, before its next checkpoint
    fit("run", "--resume", "--train-steps", 6)
    steps = [scalar.step for scalar in events.EventAccumulator(str(run)).Reload().Scalars("loss")]
    assert steps == [2, 4, 6]


def test_tensorboard_is_asked_for_by_name_where_it_is_missing(fit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs the package tensorboard; get it with: pip install tens"):
        fit("run", "--train-steps", 2, "--tensorboard")
    assert not (tmp_path / "run").exists()
