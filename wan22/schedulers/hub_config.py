"""Scheduler configs as diffusers writes them, and the settings that flow matching supports.

Each solver corresponds to one diffusers class. A schema's `fixed` settings make that class the same solver:
they are written on save, and on load any other value is refused by name.
(As in diffusers, a multistep class takes the other one's `solver_type` for its own default.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

MULTISTEP_FLOW = MappingProxyType(
    {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "final_sigmas_type": "zero",
        "thresholding": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_dynamic_shifting": False,
    }
)


@dataclass(frozen=True)
class HubSchema:
    """One diffusers scheduler class."""

    class_name: str  # written as `_class_name`
    shift_field: str  # name of the shift in that class's config
    fixed: Mapping[str, Any]  # settings with one supported value; None, False and () all mean "off"


UNIPC = HubSchema(
    class_name="UniPCMultistepScheduler",
    shift_field="flow_shift",
    fixed=MappingProxyType(
        {
            **MULTISTEP_FLOW,
            "solver_type": "bh2",
            "predict_x0": True,
            # The last step goes to sigma 0, where the second-order update divides by zero.
            "lower_order_final": True,
            "disable_corrector": (),
            "solver_p": None,
            "shift_terminal": None,
        }
    ),
)

# lower_order_final and euler_at_final may be anything: the last step, to sigma 0, is first-order anyway.
DPMPP = HubSchema(
    class_name="DPMSolverMultistepScheduler",
    shift_field="flow_shift",
    fixed=MappingProxyType(
        {
            **MULTISTEP_FLOW,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "use_lu_lambdas": False,
            "variance_type": None,
        }
    ),
)

EULER = HubSchema(
    class_name="FlowMatchEulerDiscreteScheduler",
    shift_field="shift",
    fixed=MappingProxyType(
        {
            "use_dynamic_shifting": False,
            "invert_sigmas": False,
            "shift_terminal": None,
            "stochastic_sampling": False,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
        }
    ),
)

SCHEMAS = (UNIPC, DPMPP, EULER)


def read_config(
    config: Mapping[str, Any], overrides: Mapping[str, Any], default: HubSchema
) -> dict[str, Any]:
    """Translate a diffusers scheduler config into this package's constructor arguments.

    Args:
        config: config of a class in SCHEMAS, named by its `_class_name`.
        overrides: settings that replace the config's; the shift is `shift` or `flow_shift`.
        default: schema of a config without `_class_name`.
    Returns: `num_train_timesteps`, `shift` and `solver_order`, as far as they are given.
    Raises: ValueError: the class or one of its settings is not supported here.
    """
    class_name = config.get("_class_name", default.class_name)
    source = next((schema for schema in SCHEMAS if schema.class_name == class_name), None)
    if source is None:
        supported = ", ".join(schema.class_name for schema in SCHEMAS)
        raise ValueError(f"a config of {class_name!r} is not supported; supported are those of {supported}")

    # A config made in memory may name no class, so the fields of every class are checked.
    settings = {**config, **overrides}
    for name in sorted(settings.keys() & set().union(*(schema.fixed for schema in SCHEMAS))):
        supported_values = [schema.fixed[name] for schema in SCHEMAS if name in schema.fixed]
        if (settings[name] or None) not in [value or None for value in supported_values]:
            raise ValueError(
                f"the scheduler setting {name}={settings[name]!r} is not supported; "
                f"the nearest supported value is {supported_values[0]!r}"
            )

    # A config that diffusers has converted between classes may hold both names: the class's own one counts.
    other = "shift" if source.shift_field == "flow_shift" else "flow_shift"
    shifts = [
        mapping[name]
        for mapping in (overrides, config)
        for name in (source.shift_field, other)
        if name in mapping
    ]
    arguments = {name: settings[name] for name in ("num_train_timesteps", "solver_order") if name in settings}
    return arguments | ({"shift": shifts[0]} if shifts else {})
