"""Configs of diffusers' schedulers load into ours, and ours into diffusers'."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch

from wan22.schedulers import (
    FlowMatchDPMSolverScheduler,
    FlowMatchEulerScheduler,
    FlowMatchUniPCScheduler,
    hub_config,
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
    assert hub_config.written_here(written)
    assert ours.from_pretrained(tmp_path / "ours").to_json_string() == first.to_json_string()

    other = getattr(diffusers, written["_class_name"]).from_pretrained(tmp_path / "ours")
    assert other.config[ours.schema.shift_field] == 12.0
    if ours is not FlowMatchEulerScheduler:
        assert other.config.use_flow_sigmas and other.config.prediction_type == "flow_prediction"
    assert "not expected" not in caplog.text  # diffusers knows every field written
    other.save_pretrained(tmp_path / "theirs")

    written = json.loads((tmp_path / "theirs" / "scheduler_config.json").read_text())
    assert not hub_config.written_here(written)
    again = OURS[NAMES.index(written["_class_name"])].from_pretrained(tmp_path / "theirs")
    assert type(again) is ours
    assert again.to_json_string() == first.to_json_string()
    first.set_timesteps(5)
    again.set_timesteps(5)
    assert torch.equal(first.sigmas, again.sigmas)


def three_steps(scheduler):
    """Sigmas, timesteps and what three steps make of a sample."""
    scheduler.set_timesteps(6)
    sample, generator = torch.linspace(-1, 1, 16).reshape(1, 4, 2, 2), torch.Generator().manual_seed(3)
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in takes else {}
    for t in scheduler.timesteps[:3]:
        sample = scheduler.step(0.3 * sample + 0.1, t, sample, return_dict=False, **options)[0]
    return torch.cat([scheduler.sigmas.flatten(), scheduler.timesteps.float(), sample.flatten()])


# diffusers' classes that are set to flow matching, and how.
FLOW_CLASSES = [*NAMES, "DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"]
FLOW_CLASSES += ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"]


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("name", FLOW_CLASSES)
def test_the_standard_swap_of_a_scheduler(ours, name):
    """SomeScheduler.from_config(pipe.scheduler.config, flow_shift=8.0) is that scheduler with that shift."""
    shift = "shift" if name.startswith("FlowMatch") else "flow_shift"
    cls = getattr(diffusers, name)
    swapped = cls.from_config(ours(shift=5.0).config, **{shift: 8.0})
    direct = cls(**({} if shift == "shift" else FLOW), **{shift: 8.0})
    assert torch.equal(three_steps(swapped), three_steps(direct))
    if name != "SASolverScheduler" or ours is not FlowMatchDPMSolverScheduler:  # another algorithm_type
        assert torch.equal(three_steps(ours.from_config(swapped.config)), three_steps(ours(shift=8.0)))


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


LACKING = [
    (FlowMatchUniPCScheduler, {"use_karras_sigmas": True}),
    (FlowMatchUniPCScheduler, {"use_exponential_sigmas": True}),
    (FlowMatchUniPCScheduler, {"use_dynamic_shifting": True}),
    (FlowMatchUniPCScheduler, {"solver_type": "bh1"}),
    (FlowMatchUniPCScheduler, {"disable_corrector": [0]}),
    (FlowMatchUniPCScheduler, {"lower_order_final": False}),
    (FlowMatchUniPCScheduler, {"final_sigmas_type": "sigma_min"}),
    (FlowMatchUniPCScheduler, {"thresholding": True}),
    (FlowMatchUniPCScheduler, {"solver_order": 3}),
    (FlowMatchDPMSolverScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (FlowMatchDPMSolverScheduler, {"solver_type": "heun"}),
    (FlowMatchDPMSolverScheduler, {"use_lu_lambdas": True}),
    (FlowMatchDPMSolverScheduler, {"solver_order": 3}),
    (FlowMatchEulerScheduler, {"use_dynamic_shifting": True}),
    (FlowMatchEulerScheduler, {"invert_sigmas": True}),
    (FlowMatchEulerScheduler, {"shift_terminal": 0.1}),
    (FlowMatchEulerScheduler, {"use_karras_sigmas": True}),
]


@pytest.mark.parametrize(("ours", "setting"), LACKING)
def test_what_a_solver_lacks(ours, setting, tmp_path, caplog):
    """It is refused by name where the solver is asked for, and loaded by diffusers where it was saved."""
    ((field, value),) = setting.items()
    other = theirs(ours.schema.class_name, 5.0, **setting)
    message = "solver_order=3 must be" if field == "solver_order" else f"setting {field}="
    for refused in (
        lambda: ours(**setting),
        lambda: ours.from_config(other.config),
        lambda: ours.from_config(theirs(ours.schema.class_name, 5.0).config, **setting),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    other.save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="wan22"):
        loaded = ours.from_pretrained(tmp_path)
    assert type(loaded) is type(other)
    assert f"diffusers' {ours.schema.class_name}, as it was saved" in caplog.text and field in caplog.text
    assert loaded.config[field] == value
    if field != "use_dynamic_shifting":  # which diffusers' pipelines do not set up either
        # Some of these are broken in diffusers itself, and give NaN.
        torch.testing.assert_close(three_steps(loaded), three_steps(other), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ours", OURS)
def test_settings_that_flow_matching_does_not_read(ours, tmp_path):
    """They change nothing, here as in diffusers, and are kept."""
    values = {"beta_start": 0.1, "trained_betas": np.array([0.1, 0.3]), "timestep_spacing": "trailing"}
    values |= {"rescale_betas_zero_snr": True, "euler_at_final": True, "variance_type": "learned"}
    values |= {"lambda_min_clipped": -5.1, "base_shift": 0.7}
    extra = {name: value for name, value in values.items() if name in ours.schema.defaults}
    scheduler = ours(shift=5.0, **extra)
    assert torch.equal(three_steps(scheduler), three_steps(ours(shift=5.0)))
    scheduler.save_pretrained(tmp_path)
    again = ours.from_pretrained(tmp_path)
    assert dict(again.config) == {n: v for n, v in scheduler.config.items() if n != "_use_default_values"}
    other = getattr(diffusers, ours.schema.class_name).from_pretrained(tmp_path)
    for name, value in extra.items():
        assert np.array_equal(other.config[name], value)


def test_both_names_of_the_shift():
    assert FlowMatchUniPCScheduler(flow_shift=5.0).config.shift == 5.0
    assert FlowMatchEulerScheduler(shift=5.0, flow_shift=5).config.flow_shift == 5.0
    with pytest.raises(ValueError, match=r"shift=4\.0 and flow_shift=5\.0 are one setting"):
        FlowMatchUniPCScheduler(shift=4.0, flow_shift=5.0)


def test_a_setting_that_no_class_has():
    with pytest.raises(TypeError, match="FlowMatchUniPCScheduler has no argument colour"):
        FlowMatchUniPCScheduler(colour="red")


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array, torch.tensor])
def test_numbers_of_any_library(number):
    scheduler = FlowMatchUniPCScheduler(shift=number(5.0), num_train_timesteps=np.int64(500))
    assert json.loads(scheduler.to_json_string())["flow_shift"] == 5.0
    assert scheduler.config.num_train_timesteps == 500
    scheduler.set_timesteps(np.int64(3), shift=number(2.0))
    expected = FlowMatchUniPCScheduler(shift=2.0, num_train_timesteps=500)
    expected.set_timesteps(3)
    assert torch.equal(scheduler.sigmas, expected.sigmas)


def test_diffusers_defaults_count_as_given():
    """A scheduler built with its defaults predicts epsilon, though nobody wrote so."""
    with pytest.raises(ValueError, match="prediction_type='epsilon'"):
        FlowMatchUniPCScheduler.from_config(diffusers.UniPCMultistepScheduler(flow_shift=5.0).config)


def test_other_classes_and_orders_are_refused():
    for config in ({"_class_name": "EulerDiscreteScheduler"}, diffusers.EulerDiscreteScheduler().config):
        with pytest.raises(ValueError, match="setting prediction_type='epsilon' is not supported"):
            FlowMatchEulerScheduler.from_config(config)
    with pytest.raises(ValueError, match="solver_order=3 must be an int, 1 to 2; the nearest is 2"):
        FlowMatchUniPCScheduler.from_config(theirs(NAMES[0], 5.0, solver_order=3).config)


def test_unused_kwargs_come_back():
    scheduler, unused = FlowMatchUniPCScheduler.from_config(HUB, return_unused_kwargs=True, colour="red")
    assert scheduler.config.shift == 3.0
    assert unused == {"colour": "red"}
