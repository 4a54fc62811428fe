"""The settings of distilled models: the published numbers, and what a table may hold."""

import json
import math

import pytest

from wan22 import FewSteps, Phase
from wan22.few_steps import FEW_STEPS, distilled_adapters, looks_distilled, read_few_steps


def test_lightning():
    assert FEW_STEPS["lightning-4"].timesteps == pytest.approx((1000, 937.5, 833.3333, 625), abs=1e-3)
    assert FEW_STEPS["lightning-4"].guidance_scales == [1] * 4
    table = FEW_STEPS["lightning-3-phase"]
    experts = [table.phase_of(t).expert for t in table.timesteps]
    assert experts == ["transformer"] * 4 + ["transformer_2"] * 4
    assert [table.phase_of(t).lora for t in table.timesteps] == [0] + [1] * 7
    assert table.guidance_scales == [3.5] + [1] * 7
    assert table.timesteps == pytest.approx([1000, 954.5, 900, 833.3, 750, 642.9, 500, 300], abs=0.05)


@pytest.mark.parametrize(("name", "first"), [("rcm-4", 0.98765), ("turbo", 0.99502)])
def test_trigflow_levels(name, first):
    sde, ode = FEW_STEPS[name], FEW_STEPS[f"{name}-ode"]
    assert sde.timesteps == pytest.approx([1000 * s for s in (first, 0.93378, 0.85290, 0.60898)], abs=0.006)
    assert ode.timesteps == sde.timesteps
    assert sde.noise_scale == ode.noise_scale == sde.timesteps[0] / 1000
    assert (sde.stochastic, ode.stochastic) == (True, False)


def test_fastwan_has_the_levels_next_to_its_rounded_timesteps():
    table = FEW_STEPS["fastwan-3"]
    assert table.timesteps == (1000, 757, 522) and table.stochastic
    levels = [8 * i / 1000 / (1 + 7 * i / 1000) for i in range(1, 1001)]
    nearest = [min(levels, key=lambda level, t=t: abs(1000 * level - t)) for t in table.timesteps]
    assert table.sigmas == pytest.approx(nearest, abs=1e-9)


def test_plain_values_give_the_same_table():
    for table in FEW_STEPS.values():
        assert FewSteps.from_dict(table.to_dict()) == table
    own = FewSteps((900, 400), phases=(Phase(500, lora={"a": 0.5}), Phase(0)))
    assert read_few_steps(own.to_dict()) == own == read_few_steps(own)
    assert read_few_steps(json.dumps(own.to_dict())) == own
    with pytest.raises(ValueError, match="must be a name, or JSON: Expecting property name"):
        read_few_steps("{900: 1}")


WRONG = [
    ({"timesteps": [500, 900]}, r"timesteps=\(500, 900\) must fall at every step"),
    ({"timesteps": [1001]}, r"timesteps\[0\]=1001 must be"),
    ({"timesteps": []}, "the number of timesteps=0"),
    ({"timesteps": "900"}, "timesteps='900' must be a list of numbers"),
    ({"timesteps": [900, math.nan]}, r"timesteps\[1\]=nan must be"),
    ({"timesteps": [900], "sigmas": [0.9, 0.5]}, "2 sigmas for 1 timesteps"),
    ({"timesteps": [900], "stochastic": 1}, "stochastic=1 must be True or False"),
    ({"timesteps": [900], "noise_scale": 0}, "noise_scale=0 must be"),
    ({"timesteps": [900], "phases": []}, r"down_to of the phases is \[\]; it must fall, to 0"),
    ({"timesteps": [900], "phases": [{"down_to": 10}]}, r"down_to of the phases is \[10\]"),
    ({"timesteps": [900], "phases": {"down_to": 0}}, "phases=.* must be a list of tables"),
    ({"timesteps": [900], "phases": [{"down_to": 0, "expert": "low"}]}, "expert='low' must be one of"),
    ({"timesteps": [900], "phases": [{"down_to": 0, "lora": "x"}]}, "lora='x' must be"),
    ({"timesteps": [900], "phases": [{"down_to": 0, "guidance_scale": 0.5}]}, "guidance_scale=0.5 must be"),
    ({"timesteps": [900], "phases": [{"lora": 1}]}, "a table of Phase, has no down_to"),
    ({"timesteps": [900], "stohastic": True}, "has no argument stohastic; the nearest is stochastic"),
    ({}, "a table of FewSteps, has no timesteps"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_tables_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        read_few_steps(values)


def test_names():
    with pytest.raises(ValueError, match=r"distilled='lightning4' must be one of .*nearest is 'lightning-4'"):
        read_few_steps("lightning4")
    assert looks_distilled("lightx2v/Wan2.2-Lightning") == "lightning-4"
    assert looks_distilled("TurboDiffusion/TurboWan2.2-I2V-A14B-720P") == "turbo"
    assert looks_distilled("FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers") == "fastwan-3"
    assert looks_distilled("/home/rcm/loras/wan/style.safetensors") is None
    assert looks_distilled("marcmodels/style.safetensors") is None
    assert looks_distilled("Wan-AI/Wan2.2-T2V-A14B-Diffusers") is None


def test_the_distilled_one_of_several_adapters():
    assert distilled_adapters({"a": "style.safetensors"}) == ["a"]
    assert distilled_adapters({"a": "style.safetensors", "b": "x/Lightning.safetensors"}) == ["b"]
    assert distilled_adapters({"a": None, "lightning": ""}) == ["lightning"]
    with pytest.raises(ValueError, match="which of a, b that is; load it with adapter_name='lightning'"):
        distilled_adapters({"a": "style", "b": "other"})
    with pytest.raises(ValueError, match="none is loaded"):
        distilled_adapters({})
