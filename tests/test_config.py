import dataclasses

import pytest
from conftest import ROOT

from config import PAPER_MODELS, PRESETS, Config, preset
from support.command_line import Parser, run_script
from support.errors import UserError


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(image_size=28, patch_size=3), "28 is not divisible by patch_size 3; try patch_size 2, 4, 7, 14"),
        (dict(hidden_size=90, num_heads=4), "hidden_size 90 is not divisible by num_heads 4 and by 4; try 88"),
        (dict(hidden_size=66, num_heads=3), "hidden_size 66 is not divisible by num_heads 3 and by 4; try 72"),
        (dict(train_steps=-5), "train_steps is -5; it must be at least 1"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(learning_rate=0.0), "learning_rate is 0.0; it must be more than 0"),
        (dict(cfg_scale=float("inf")), "cfg_scale is inf"),
        (dict(ema_decay=1.0), "ema_decay is 1.0"),
        (dict(sample_steps=0), "sample_steps is 0; it must be at least 1"),
        (dict(sample_steps=1001), "sample_steps is 1001; it must be at most 1000"),
        (dict(sampler="heun"), "sampler 'heun' is not one of process diffusion's: ddpm, ddim, dpm++"),
        (dict(sampler="ddpm", eta=0.5), "eta 0.5 is an option of sampler ddim"),
        (dict(schedule="sigmoid"), "schedule 'sigmoid' is not one of linear, cosine"),
        (dict(depth="4"), "depth '4' is not of type int"),
        (dict(block="post-norm"), "block 'post-norm' is not one of in-context, cross-attention, adaLN, adaLN-Zero"),
        (dict(batch_size=64, accumulation_steps=7), "accumulation_steps is 7; it must be a divisor of batch_size, 64"),
        (dict(learn_sigma=1), "learn_sigma 1 is not of type bool"),
        (dict(seed=None), "seed None is not of type int"),
        (dict(seed=2**32), "seed is 4294967296; it must be less than 4294967296"),  # it would draw what seed 0 draws
    ],
)
def test_impossible_settings_are_refused_with_a_way_out(fields, message):
    with pytest.raises(UserError) as error:
        Config(**fields)
    assert message in str(error.value)


def test_presets_are_changed_by_what_is_given():
    for name in PRESETS:
        assert preset(name).preset == name
    assert preset("classic", depth=7).depth == 7 and preset("classic").loss == "l1"
    for options in (dict(learn_sigma=True), dict(clip_x0=False)):
        with pytest.raises(UserError, match=f"{next(iter(options))} is an option of process diffusion, not of flow_m"):
            preset("flow", **options)
    with pytest.raises(UserError, match="'large' is not one of digits"):
        preset("large")


def test_the_papers_models_are_presets():
    xl = preset("DiT-XL/2")
    assert (xl.depth, xl.hidden_size, xl.num_heads, xl.patch_size, xl.image_size) == (28, 1152, 16, 2, 32)
    assert (xl.prediction, xl.schedule, xl.learn_sigma, xl.learning_rate) == ("noise", "linear", True, 1e-4)
    assert xl.run_dir == ROOT / "runs" / "DiT-XL-2"
    assert len(set(PAPER_MODELS) & set(PRESETS)) == 12


def parser() -> Parser:
    parser = Parser("test")
    parser.add_fields(*(field.name for field in dataclasses.fields(Config)))
    return parser


def test_flags_are_the_fields_and_only_those_given_come_back():
    flags = ["--hidden-size", "64", "--learning-rate", "2e-3", "--prediction", "x0", "--learn-sigma", "--no-clip-x0"]
    given = {"hidden_size": 64, "learning_rate": 2e-3, "prediction": "x0", "learn_sigma": True, "clip_x0": False}
    assert vars(parser().parse_args(flags)) == given


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"] in text
    assert "(default: 0.003)" in text


@pytest.mark.parametrize("flags", [["--depth", "four"], ["--precision", "fp8"], ["--no-such-flag"], ["--dep", "4"]])
def test_a_mistake_on_the_command_line_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as exit:
        parser().parse_args(flags)
    assert exit.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_run_script_turns_mistakes_into_one_line_and_lets_bugs_through():
    def fail(error):
        raise error

    for error, words in (
        (UserError("no"), "error: no"),
        (PermissionError(13, "Permission denied", "a/b"), "error: a/b: Permission denied; check"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), "error: not enough memory; try a smaller"),
    ):
        with pytest.raises(SystemExit) as exit:
            run_script(lambda error=error: fail(error))
        assert exit.value.code.startswith(words)
    for bug in (KeyError, RuntimeError):
        with pytest.raises(bug):
            run_script(lambda bug=bug: fail(bug("a bug")))
