import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_one_line_error, run

import benchmark
from benchmark import Step, compare, diffusers_dit, paired_ratio, relative_error, size_config
from support import speed
from support.errors import UserError
from support.published import from_diffusers

CPU = torch.device("cpu")
MEMORY = {"weights": 20e6, "forward peak": 21e6}
MEMORY |= {f"{kind} {what}": 1e6 for kind in ("training", "checkpointed") for what in ("activations", "peak")}


@pytest.fixture
def short(monkeypatch):
    """Quick figures that mean nothing: short samples, small matrix products, one thin block, no memory measured."""
    monkeypatch.setattr(benchmark, "memory_report", lambda *_: MEMORY)
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(speed, "MATMUL_SIZE", {"cpu": 256})
    monkeypatch.setattr(speed, "PEAK_SECONDS", 0.002)
    monkeypatch.setattr(benchmark, "size_config", lambda name: size_config(name).replace(hidden_size=32, depth=1))


def main(tmp_path, *flags: str) -> dict:
    path = tmp_path / "report.json"
    flags = ("--models", "digits", "--batch-size", "2", "--device", "cpu", "--precision", "fp32", *flags)
    benchmark.main([*flags, "--json", str(path)])
    return json.loads(path.read_text())


def test_the_report(short, tmp_path, capsys):
    report = main(tmp_path, "--repeats", "3", "--compile", "off")
    model = report["models"]["digits"]
    assert report["machine"]["peaks"]["fp32"] > 0 and model["batch_size"] == 2
    assert model["relative_error"] < 1e-5
    assert model["memory"] == MEMORY
    for mode, times in (("forward", 1), ("training", 3)):
        speed = model["speed"][mode]
        ours, theirs = (speed["seconds"][name]["eager fp32"] for name in ("ours", "diffusers"))
        assert len(ours) == len(theirs) == 3
        assert speed["ratios"] == [{"ours": "eager fp32", "diffusers": "eager fp32", **paired_ratio(theirs, ours)}]
        images_per_second = speed["images_per_second"]["ours"]["eager fp32"]
        assert images_per_second == pytest.approx(2 / sorted(ours)[1])
        flops = times * 2e9 * model["gflops"] * images_per_second
        assert speed["share_of_peak"]["eager fp32"] == pytest.approx(flops / report["machine"]["peaks"]["fp32"])
    printed = capsys.readouterr().out
    assert all(
        word in printed for word in ("| of peak, eager fp32 |", "1.05", "saved", "relative error", "median ratio")
    )


def test_without_diffusers_ours_is_measured_alone(short, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(benchmark, "memory_report", lambda *_: {})  # as where memory cannot be measured
    report = main(tmp_path, "--repeats", "1", "--compile", "off")
    assert report["machine"]["diffusers"] is None
    assert list(report["models"]["digits"]["speed"]["training"]["seconds"]) == ["ours"]
    assert "pip install diffusers" in capsys.readouterr().out


def test_compiled_networks_are_a_variant_unless_one_does_not_compile(short, tmp_path, monkeypatch):
    compiled = []

    def compile_network(network, loss_of):
        loss_of(network).backward()
        assert any(parameter.grad is not None for parameter in network.parameters())
        network.zero_grad()
        compiled.append(network)
        return network if failing and len(compiled) == 2 else lambda *batch: network(*batch)

    monkeypatch.setattr(benchmark, "compile_network", compile_network)
    for failing, variants in ((False, ["eager fp32", "compiled fp32"]), (True, ["eager fp32"])):
        compiled.clear()
        speed = main(tmp_path, "--repeats", "1", "--modes", "forward")["models"]["digits"]["speed"]
        assert list(speed) == ["forward"] and len(compiled) == 2
        assert list(speed["forward"]["images_per_second"]["diffusers"]) == variants


def test_ratios_are_of_the_same_round():
    """A machine that slows down tenfold in one round changes no ratio; means of all rounds would see it."""
    ours, theirs = [1.0, 10.0, 1.0], [2.0, 30.0, 1.5]
    assert paired_ratio(theirs, ours) == {"median": 2.0, "least": 1.5, "most": 3.0}
    with pytest.raises(ValueError):
        paired_ratio(theirs, ours[:2])


def test_networks_are_compared_like_with_like_and_our_default_with_theirs():
    names = ("eager fp32", "eager bf16", "compiled bf16")
    seconds = {"ours": dict(zip(names, ([4.0], [2.0], [1.0]))), "diffusers": dict(zip(names, ([6.0], [5.0], [4.0])))}
    ratios = [(ratio["ours"], ratio["diffusers"], ratio["median"]) for ratio in compare(seconds)]
    assert ratios == [*((name, name, m) for name, m in zip(names, (1.5, 2.5, 4.0))), (names[2], names[0], 6.0)]


def test_every_call_is_timed_once_a_round_in_turn(monkeypatch):
    order = []
    monkeypatch.setattr(benchmark, "seconds_of", lambda call, calls, device: call() or 1.0)
    calls = {name: lambda name=name: order.append(name) for name in "ABC"}
    assert benchmark.time_in_turn(calls, 3, CPU) == dict.fromkeys("ABC", [1.0] * 3)
    assert order[-9:] == list("ABC" * 3)


def test_the_relative_error_sees_a_difference():
    config = size_config("digits")
    theirs, model, step = diffusers_dit(config), benchmark.build_model(config), Step(config, 2, CPU)
    model.load_state_dict(from_diffusers(theirs.state_dict(), config.image_size))
    reference = step.forward(theirs, "fp32")
    assert relative_error(step.forward(model, "fp32"), reference) < 1e-5
    assert 1e-4 < relative_error(step.forward(model, "bf16"), reference) < 0.1
    model.blocks[1].mlp.fc1.weight.data.mul_(1.1)
    assert relative_error(step.forward(model, "fp32"), reference) > 1e-4
    assert relative_error(reference * 1.5, reference) == pytest.approx(0.5)


def test_gflops_and_sizes_by_name():
    with torch.device("meta"):
        model = benchmark.build_model(size_config("digits"))
        paper = benchmark.build_model(size_config("DiT-S/4"))
    tokens, hidden, depth, patch = 16, 128, 6, 7 * 7
    linear = depth * (tokens * 12 * hidden**2 + 6 * hidden**2) + tokens * 2 * patch * hidden
    conditioning = 256 * hidden + hidden**2 + 2 * hidden**2
    attention = depth * 2 * tokens**2 * hidden
    assert benchmark.count_gflops(model) == pytest.approx((linear + conditioning + attention) / 1e9)
    assert (paper.image_size, paper.in_channels, paper.num_classes) == (32, 4, 1000)
    assert paper.final_layer.linear.out_features == 4 * 4 * 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is Linux's")
def test_peak_memory_is_the_highest_moment():
    """In a process of its own: one that has worked before may have the memory already."""
    code = """
import torch, benchmark
cpu = torch.device("cpu")
for megabytes in (300, 100):  # the mark is reset, or the second would find the first's
    before = benchmark.memory_now(cpu)
    print(benchmark.peak_memory(cpu, lambda: torch.ones(megabytes * 250_000)) - before)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [int(figure) for figure in result.stdout.split()] == pytest.approx([3e8, 1e8], rel=0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is Linux's")
def test_memory_of_each_mode():
    config = size_config("digits").replace(patch_size=4, hidden_size=384)
    memory = benchmark.memory_report(config, ["forward", "training"], 16, CPU, "fp32")
    model = benchmark.build_model(config)
    assert memory["weights"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert memory["weights"] < memory["forward peak"] < 2.5 * memory["weights"]
    # A block saves at least 20 numbers for each feature of a token; gradients and AdamW's state are 3 weights.
    assert memory["training activations"] > 16 * 6 * 49 * 20 * 384 * 4
    # Resident memory is read to within some megabytes: what the allocator keeps for later counts too.
    assert memory["training peak"] > 0.9 * (memory["training activations"] + 3 * memory["weights"])
    assert memory["checkpointed activations"] < 0.6 * memory["training activations"]  # about 0.3 of it
    assert memory.keys() == MEMORY.keys()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--models", "digits,DiT-M/2"), ("'DiT-M/2'", "digits", "DiT-XL/2")),
        (("--modes", "forward,sampling"), ("'sampling'", "forward, training")),
        (("--batch-size", "0"), ("batch_size is 0", "at least 1")),
        (("--repeats", "0"), ("repeats is 0", "at least 1")),
        (("--json", "report.txt"), ("report.txt", ".json")),
    ],
)
def test_mistakes_are_named(flags, words):
    with pytest.raises(UserError) as error:
        benchmark.main(list(flags))
    assert all(word in str(error.value) for word in words)


def test_the_script_says_a_mistake_in_one_line():
    assert_one_line_error(run("benchmark.py", "--models", "DiT-M/2"), "DiT-M/2", "DiT-XL/2")
