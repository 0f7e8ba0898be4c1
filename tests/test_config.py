import dataclasses
import math

import pytest
from conftest import ROOT

from config import PAPER_MODELS, PRESETS, Config, preset
from support.errors import UserError
from support.options import check_option


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


def test_another_process_than_the_presets_has_a_sampler_of_its_own():
    assert preset("fashion").sampler == "ddpm" and preset("fashion", process="flow_matching").sampler == "euler"
    assert preset("flow", process="diffusion").sampler == "dpm++"
    assert preset("pictures", process="flow_matching", sampler="heun").sampler == "heun"


def test_the_papers_models_are_presets():
    xl = preset("DiT-XL/2")
    assert (xl.depth, xl.hidden_size, xl.num_heads, xl.patch_size, xl.image_size) == (28, 1152, 16, 2, 32)
    assert (xl.prediction, xl.schedule, xl.learn_sigma, xl.learning_rate) == ("noise", "linear", True, 1e-4)
    assert xl.run_dir == ROOT / "runs" / "DiT-XL-2"
    assert len(set(PAPER_MODELS) & set(PRESETS)) == 12


LIMITED = [field for field in dataclasses.fields(Config) if field.metadata["limits"]]
NUMBERS = [field for field in dataclasses.fields(Config) if field.metadata["type"] in (int, float)]


@pytest.mark.parametrize("field", LIMITED, ids=lambda field: field.name)
def test_a_value_beyond_a_limit_is_refused_naming_field_and_bound(field):
    """And one at the limit is not."""
    step = 1 if field.metadata["type"] is int else 1e-6
    beyond = {"least": -step, "most": step, "above": 0, "below": 0}
    for limit, bound in field.metadata["limits"].items():
        value = bound + beyond[limit]
        with pytest.raises(UserError, match=rf"^{field.name} is {value}; it must be .* {bound}$"):
            Config(**{field.name: value})
        within = bound if limit in ("least", "most") else bound + (step if limit == "above" else -step)
        check_option(field, within)


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_absurd_numbers_are_refused_naming_the_field(field):
    for value in (math.nan, math.inf, -math.inf) if field.metadata["type"] is float else (10**19, -(10**19), 10**400):
        with pytest.raises(UserError, match=f"^{field.name} "):
            Config(**{field.name: value})
    if field.metadata["type"] is int:  # a whole number has a least and a largest value
        assert {"least", "most"} <= field.metadata["limits"].keys() or field.metadata["limits"]["below"] == 2**32
