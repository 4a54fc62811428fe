"""Configs of diffusers' schedulers load into ours, and ours into diffusers'."""

import json

import diffusers
import pytest
import torch

from wan22.schedulers import (
    FlowMatchDPMSolverScheduler,
    FlowMatchEulerScheduler,
    FlowMatchUniPCScheduler,
)

OURS = [FlowMatchUniPCScheduler, FlowMatchDPMSolverScheduler, FlowMatchEulerScheduler]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def theirs(name, shift, **settings):
    if name == "FlowMatchEulerDiscreteScheduler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **settings)
    return getattr(diffusers, name)(**{**FLOW, "flow_shift": shift, **settings})


NAMES = [solver.schema.class_name for solver in OURS]

# What the hub's Wan repositories hold.
HUB = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.35.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "time_shift_type": "exponential",
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}


@pytest.mark.parametrize("ours", OURS)
def test_loads_the_hub_config(ours, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(HUB))
    scheduler = ours.from_pretrained(tmp_path)
    assert type(scheduler) is ours
    assert scheduler.config.shift == 3.0


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("name", NAMES)
def test_loads_every_flow_scheduler_of_diffusers(name, ours, tmp_path):
    other = theirs(name, 7.0)
    assert ours.from_config(other.config).config.shift == 7.0
    other.save_pretrained(tmp_path)
    scheduler = ours.from_pretrained(tmp_path)
    assert scheduler.config.shift == 7.0
    assert ours.from_config(other.config, shift=2.0).config.shift == 2.0
    assert ours.from_config(other.config, flow_shift=2.0).config.shift == 2.0


@pytest.mark.parametrize("ours", OURS)
def test_round_trip_through_diffusers(ours, tmp_path, caplog):
    order = {} if ours is FlowMatchEulerScheduler else {"solver_order": 1}
    first = ours(shift=12.0, num_train_timesteps=500, **order)
    first.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "scheduler_config.json").read_text())

    other = getattr(diffusers, written["_class_name"]).from_pretrained(tmp_path / "ours")
    assert other.config[ours.schema.shift_field] == 12.0
    if ours is not FlowMatchEulerScheduler:
        assert other.config.use_flow_sigmas and other.config.prediction_type == "flow_prediction"
    assert "not expected" not in caplog.text  # diffusers knows every field written
    other.save_pretrained(tmp_path / "theirs")

    written = json.loads((tmp_path / "theirs" / "scheduler_config.json").read_text())
    again = OURS[NAMES.index(written["_class_name"])].from_pretrained(tmp_path / "theirs")
    assert type(again) is ours
    assert again.to_json_string() == first.to_json_string()
    first.set_timesteps(5)
    again.set_timesteps(5)
    assert torch.equal(first.sigmas, again.sigmas)


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_classes_build_from_our_live_config(ours, name):
    """Scripts swap solvers with SomeScheduler.from_config(pipe.scheduler.config, flow_shift=...)."""
    live = ours(shift=7.0).config
    other = getattr(diffusers, name).from_config(live)
    if name == "FlowMatchEulerDiscreteScheduler":
        assert other.config.shift == 7.0
    else:
        assert other.config.flow_shift == 7.0
        assert other.config.use_flow_sigmas and other.config.prediction_type == "flow_prediction"
        assert getattr(diffusers, name).from_config(live, flow_shift=2.0).config.flow_shift == 2.0


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("target", OURS)
def test_our_solvers_build_from_each_other(ours, target):
    scheduler = target.from_config(ours(shift=7.0).config)
    assert type(scheduler) is target and scheduler.config.shift == 7.0
    assert json.loads(scheduler.to_json_string())["_class_name"] == target.schema.class_name


def test_the_class_decides_which_shift_counts():
    """diffusers keeps the old class's fields when it converts a config."""
    converted = diffusers.UniPCMultistepScheduler.from_config(
        theirs(NAMES[2], 1.5).config, flow_shift=5.0, **FLOW
    )
    assert converted.config.shift == 1.5
    assert FlowMatchUniPCScheduler.from_config(converted.config).config.shift == 5.0


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (NAMES[0], {"use_karras_sigmas": True}),
        (NAMES[0], {"prediction_type": "epsilon"}),
        (NAMES[0], {"use_flow_sigmas": False}),
        (NAMES[0], {"use_dynamic_shifting": True}),
        (NAMES[0], {"solver_type": "bh1"}),
        (NAMES[0], {"disable_corrector": [0]}),
        (NAMES[0], {"lower_order_final": False}),
        (NAMES[0], {"final_sigmas_type": "sigma_min"}),
        (NAMES[1], {"algorithm_type": "sde-dpmsolver++"}),
        (NAMES[1], {"solver_type": "heun"}),
        (NAMES[1], {"use_lu_lambdas": True}),
        (NAMES[2], {"use_dynamic_shifting": True}),
        (NAMES[2], {"invert_sigmas": True}),
        (NAMES[2], {"shift_terminal": 0.1}),
        (NAMES[2], {"stochastic_sampling": True}),
    ],
)
@pytest.mark.parametrize("ours", OURS)
def test_unsupported_settings_are_refused_by_name(ours, name, setting, tmp_path):
    (field, value) = next(iter(setting.items()))
    message = f"setting {field}="
    other = theirs(name, 5.0, **setting)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ours.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ours.from_config(other.config)
    with pytest.raises(ValueError, match=message):
        ours.from_config(theirs(name, 5.0).config, **{field: value})


def test_diffusers_defaults_count_as_given():
    """A scheduler built with its defaults predicts epsilon, though nobody wrote so."""
    with pytest.raises(ValueError, match="prediction_type='epsilon'"):
        FlowMatchUniPCScheduler.from_config(diffusers.UniPCMultistepScheduler(flow_shift=5.0).config)


def test_other_classes_and_orders_are_refused():
    with pytest.raises(ValueError, match="config of 'EulerDiscreteScheduler' is not supported"):
        FlowMatchEulerScheduler.from_config({"_class_name": "EulerDiscreteScheduler"})
    with pytest.raises(ValueError, match="solver_order must be 1 or 2, got 3"):
        FlowMatchUniPCScheduler.from_config(theirs(NAMES[0], 5.0, solver_order=3).config)


def test_unused_kwargs_come_back():
    scheduler, unused = FlowMatchUniPCScheduler.from_config(HUB, return_unused_kwargs=True, colour="red")
    assert scheduler.config.shift == 3.0
    assert unused == {"colour": "red"}
