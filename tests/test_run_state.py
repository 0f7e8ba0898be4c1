"""What resuming believes of a checkpoint.pth: nothing that does not fit."""

import copy
import math

import pytest
import torch
from test_train import TINY, assert_same, blobs, fit  # noqa: F401  blobs is a fixture for each test

import train
from config import Config
from support import checkpoint, run_state
from support.checkpoint import BEFORE
from support.errors import UserError
from support.files import load_file, save_file
from support.run_state import check_progress, load_checkpoint

STEPS = 7
OF_OLD = ["--time-sampling", "uniform", "--time-mean", 0, "--cfg-low", 0, "--cfg-high", 1]  # what was before flags
FIELDS = [name for name in vars(Config()) if name not in checkpoint.OF_THE_MACHINE]


of_both_optimizers = pytest.mark.parametrize("run_dir", ["adamw", "muon"], indirect=True)


@pytest.fixture(scope="module")
def run_dir(request, tmp_path_factory):
    """The folder of a run that ended after 7 steps, and may go on."""
    optimizer = getattr(request, "param", "adamw")
    folder = tmp_path_factory.mktemp(optimizer)
    with pytest.MonkeyPatch.context() as patch:
        blobs.__wrapped__(patch)
        flags = ["--train-steps", STEPS, "--lr-decay", "constant", "--optimizer", optimizer]
        fit(folder, *flags, *OF_OLD, "--hidden-size", 8)
    return folder


def go_on(folder):
    train.main(["--resume", "--out-dir", str(folder), "--train-steps", str(2 * STEPS)])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused(folder, alterations):
    """Each alteration of the checkpoint is refused in one line that names the file, and no file is touched."""
    path, before = folder / "checkpoint.pth", contents(folder)
    state = load_file(path)
    for name, (alter, message) in alterations.items():
        altered = copy.deepcopy(state)
        altered = alter(altered) or altered
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as error:
            patch.setattr(run_state, "load_file", lambda path, altered=altered: altered)
            go_on(folder)
        assert str(error.value).startswith(f"{path}"), f"{name}: {error.value}"
        assert message in str(error.value), f"{name}: {error.value}"
        assert "\n" not in str(error.value), name
    assert contents(folder) == before


@of_both_optimizers
def test_unaltered_it_goes_on_to_the_same_bits_and_so_without_what_newer_versions_add(run_dir, tmp_path, capsys):
    optimizer = load_checkpoint(run_dir / "checkpoint.pth")[0].optimizer
    flags = ["--hidden-size", 8, "--lr-decay", "constant", "--optimizer", optimizer, *OF_OLD]
    fit(tmp_path / "whole", "--train-steps", 2 * STEPS, *flags)
    whole = load_file(tmp_path / "whole" / "checkpoint.pth")

    def as_older_versions(state):
        del state["made_with"]
        same = [name for name, value in BEFORE.items() if state["config"][name] == value]
        for name in (*same, *checkpoint.OF_THE_MACHINE):
            del state["config"][name]

    def other_settings(state):
        """The optimizer's settings are the config's; what its file says of them is ignored."""
        for saved in state["optimizers"]:
            saved["param_groups"] = [{"lr": 1e9, "params": "nonsense"}]

    for name, alter in (("a", lambda state: None), ("b", as_older_versions), ("c", other_settings)):
        (tmp_path / name).mkdir()
        state = load_file(run_dir / "checkpoint.pth")
        alter(state)
        save_file(state, tmp_path / name / "checkpoint.pth")
        go_on(tmp_path / name)
        resumed = load_file(tmp_path / name / "checkpoint.pth")
        for key in ("model", "ema", "optimizers", "made_with"):
            assert_same(resumed[key], whole[key])
        assert resumed["progress"][0] == 2 * STEPS
    assert "note:" not in capsys.readouterr().err


def changed(*keys, value):
    """A function that sets state[key][key]... to a value, or to what a function makes of it."""

    def alter(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

    return alter


def without(*keys):
    def alter(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return alter


def test_other_content_is_refused(run_dir):
    table = {"a list": (lambda state: [1, 2], "is not a checkpoint of train.py")}
    table["weights alone"] = (lambda state: state["model"], "is not a checkpoint of train.py")
    table["a model.pth"] = (lambda state: {"model": state["ema"], "config": state["config"]}, "is not a checkpoint")
    table["more"] = (lambda state: {**state, "more": 3}, "is not a checkpoint of train.py")
    for key in ("config", "model", "ema", "optimizers", "progress"):
        table[f"no {key}"] = (without(key), "is not a checkpoint of train.py")
    for key in ("config", "model", "ema", "optimizers", "progress", "made_with"):
        for value in (None, 3, "text", [1], {"a": [3]}, torch.ones(3)):
            table[f"{key} {value}"] = (changed(key, value=value), "holds no")
    table["empty weights"] = (changed("model", value={}), "it lacks 'x_embedder.proj.weight'")
    table["no optimizers"] = (changed("optimizers", value=[]), "it has 0 optimizers")
    table["made with lists"] = (changed("made_with", value={"threads": [1]}), "made_with is not what")
    check_refused(run_dir, table)


def test_each_field_of_the_config_is_checked(run_dir, monkeypatch):
    def built(config):
        pytest.fail(f"a network was built: {config}")

    table = {}
    for name in FIELDS:
        if name not in BEFORE:
            table[f"no {name}"] = (without("config", name), f"holds no usable config (it lacks '{name}')")
        table[f"{name} of a type"] = (changed("config", name, value=[1]), f"holds no usable config ({name} [1] is not")
    for name in checkpoint.OF_EVERY_FILE[:7]:
        for value in (-1, 0, 10**9, 10**400, 1.5, "4"):
            table[f"{name} {value}"] = (changed("config", name, value=value), "holds no")
        if name != "num_heads":  # of which weights say nothing
            table[f"{name} lies"] = (changed("config", name, value=lambda size: 2 * size), "holds no")
    table["a learned variance"] = (changed("config", "learn_sigma", value=True), "have learn_sigma False")
    table["a field too many"] = (lambda state: {**state, "config": state["config"] | {"n": 1}}, "holds no usable conf")
    with monkeypatch.context() as patch:  # a size that lies costs neither time nor memory
        patch.setattr(checkpoint, "build_model", built)
        check_refused(run_dir, table)
    table = {"another block": (changed("config", "block", value="in-context"), "blocks.0.norm1.weight is missing")}
    lie = {"adamw": "muon", "muon": "adamw"}
    table["another optimizer"] = (changed("config", "optimizer", value=lie.get), "optimizers, and its config builds")
    check_refused(run_dir, table)


def test_each_tensor_is_checked(run_dir):
    table = {}
    for part in ("model", "ema"):
        for name in list(load_file(run_dir / "checkpoint.pth")[part])[::4]:
            for what, value in (
                ("NaN", lambda tensor: tensor.index_put([torch.tensor(0)] * tensor.ndim, torch.tensor(math.nan))),
                ("a row short", lambda tensor: tensor[1:]),
                ("an axis more", lambda tensor: tensor[None]),
                ("double", torch.Tensor.double),
                ("half", torch.Tensor.half),
                ("whole", torch.Tensor.int),
                ("none", lambda tensor: None),
                ("a list", torch.Tensor.tolist),
            ):
                table[f"{part} {name} {what}"] = (changed(part, name, value=value), "holds no run to go on with")
            table[f"{part} no {name}"] = (without(part, name), "holds no run to go on with")
        table[f"{part} more"] = (lambda state, part=part: state[part].update(a=torch.ones(1)), "a is no part of a mod")
        table[f"{part} number"] = (lambda state, part=part: state[part].update({3: torch.ones(1)}), "holds no run")
    check_refused(run_dir, table)


@of_both_optimizers
def test_each_moment_is_checked(run_dir):
    table = {}
    optimizers = load_file(run_dir / "checkpoint.pth")["optimizers"]
    for i, saved in enumerate(optimizers):
        place = ("optimizers", i)
        for index, moments in list(saved["state"].items())[-1:]:
            table[f"{i} no {index}"] = (without(*place, "state", index), "has not a state for each parameter")
            table[f"{i} empty {index}"] = (changed(*place, "state", index, value={}), "its optimizer holds")
            for name, tensor in moments.items():
                at = (*place, "state", index, name)
                table[f"no {at}"] = (without(*at), "its optimizer holds")
                for what, value in (
                    ("NaN", lambda tensor: tensor * math.nan),
                    ("infinite", lambda tensor: tensor + math.inf),
                    ("an axis more", lambda tensor: tensor[None]),
                    ("empty", lambda tensor: tensor.flatten()[:0]),
                    ("double", torch.Tensor.double),
                    ("whole", torch.Tensor.int),
                ):
                    table[f"{what} {at}"] = (changed(*at, value=value), f"{name} of its optimizer is")
                table[f"none {at}"] = (changed(*at, value=None), "holds no run to go on with")
                if tensor.ndim:
                    table[f"short {at}"] = (changed(*at, value=lambda t: t[1:]), f"{name} of its optimizer is")
            if "step" in moments:
                at = (*place, "state", index)
                for step in (0.0, STEPS + 1.0, -1.0, 1e9):
                    wrong = changed(*at, "step", value=torch.tensor(step))
                    table[f"step {step} {at}"] = (wrong, f"has taken {step:.0f} steps, not {STEPS}")
                table[f"negative {at}"] = (changed(*at, "exp_avg_sq", value=lambda t: t - 1), "is negative")
        table[f"{i} empty"] = (changed(*place, "state", value={}), "has not a state for each parameter")
        more = {len(saved["state"]): moments}
        table[f"{i} more"] = (lambda s, i=i, more=more: s["optimizers"][i]["state"].update(more), "has not a state for")
        for value in ({}, None, 3, []):
            table[f"{i} is {value}"] = (changed("optimizers", i, value=value), "holds no run to go on with")
    table["one more"] = (lambda state: state["optimizers"].append(state["optimizers"][0]), "optimizers, and its config")
    table["one less"] = (lambda state: state["optimizers"].pop() and None, "optimizers, and its config")
    check_refused(run_dir, table)


def test_the_counters_are_checked(run_dir):
    step, rows, loss_sum, loss_count, seconds = load_file(run_dir / "checkpoint.pth")["progress"]
    assert (step, len(rows), loss_count) == (STEPS, 2, 0)
    table = {}
    for at, values in enumerate(
        (
            [10**9, 10**400, -5, 0, STEPS - 1, STEPS + 1, 7.0, "7", None, True, torch.tensor(7)],
            [None, "text", (), [3], [None], ["1,2,3"], ["a,b,c,d"], [rows[0] + "\n"], rows[:1], rows * 2, rows[::-1]]
            + [[rows[0], rows[1].replace("7,", "7.5,", 1)], [rows[0], "7,nan,1,1"], {"5,1,1,1": 1}],
            [math.nan, math.inf, None, "0", [0.0]],
            [-1, 1, STEPS, 0.5, None, "0"],
            [math.nan, math.inf, -1.0, None, "0"],
        )
    ):
        for value in values:
            table[f"{at} {value}"] = (changed("progress", at, value=value), "holds no run to go on with")
    for length in (0, 4):
        table[f"{length} of them"] = (changed("progress", value=lambda p, n=length: p[:n]), "holds no run to go on")
    check_refused(run_dir, table)


def test_counters_of_every_run_pass():
    check_progress(0, [], 0.0, 0, 0.0, train_steps=1)
    check_progress(49, [], 3.5, 49, 0.1, train_steps=50)
    check_progress(60, ["50,0.123456,1e-05,9.9", "55,0.1,0.003,1000.0"], 3.5, 5, 0.1, train_steps=60)
    check_progress(50, ["50,-0.000012,0,9.9"], 0.0, 0, 0.0, train_steps=100)


def test_too_little_memory_while_restoring_is_not_the_files_fault(run_dir, monkeypatch):
    def short(*_):
        raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(run_state, "restore_optimizer", short)
    with pytest.raises(RuntimeError, match="can't allocate"):
        go_on(run_dir)
