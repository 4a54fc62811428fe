"""Scheduler configs as diffusers writes them, and the settings that the solvers here have.

Each solver corresponds to one diffusers class. A schema's `fixed` settings make that class the same solver;
any other value of them is a setting that the solver lacks. The class's further settings are read by diffusion
schedules alone, not by flow matching: they are kept, and written again.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import diffusers

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
# Who wrote a config: diffusers puts its own version in place of this one when it writes a config itself.
WRITER = f"{diffusers.__version__}+wan22"


@dataclass(frozen=True)
class HubSchema:
    """One diffusers scheduler class."""

    class_name: str  # written as `_class_name`
    shift_field: str  # name of the shift in that class's config
    fixed: Mapping[str, Any]  # settings with one supported value; None, False and () all mean "off"
    orders: tuple[int, ...]  # supported values of solver_order
    foreign: Mapping[str, tuple[str, ...]]  # other classes' values, which diffusers takes for its default

    @property
    def defaults(self) -> dict[str, Any]:
        """All settings of the class, with its default values."""
        parameters = inspect.signature(getattr(diffusers, self.class_name).__init__).parameters
        return {name: p.default for name, p in parameters.items() if name != "self"}

    def lacking(self, settings: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        """Return name, value and supported value of the first setting that the solver lacks, if any."""
        # A model that predicts something else is none for flow matching, whatever the class.
        for name, supported in {"prediction_type": "flow_prediction", **self.fixed}.items():
            value = settings.get(name, supported)
            if value != supported and (value or supported):
                return name, value, supported
        return None


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
            "disable_corrector": [],
            "solver_p": None,
            "shift_terminal": None,
        }
    ),
    orders=(1, 2),
    foreign=MappingProxyType({"solver_type": ("midpoint", "heun", "logrho")}),
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
        }
    ),
    orders=(1, 2),
    foreign=MappingProxyType({"solver_type": ("logrho", "bh1", "bh2"), "algorithm_type": ("deis",)}),
)

EULER = HubSchema(
    class_name="FlowMatchEulerDiscreteScheduler",
    shift_field="shift",
    fixed=MappingProxyType(
        {
            "use_dynamic_shifting": False,
            "invert_sigmas": False,
            "shift_terminal": None,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
        }
    ),
    orders=(),
    foreign=MappingProxyType({}),
)

SCHEMAS = (UNIPC, DPMPP, EULER)
SETTINGS = {"shift", "flow_shift"}.union(*(schema.defaults for schema in SCHEMAS))


def written_here(config: Mapping[str, Any]) -> bool:
    """Return whether a config was written by a solver of this package, and not by diffusers since."""
    return str(config.get("_diffusers_version", "")).endswith("+wan22")


def read_config(config: Mapping[str, Any], overrides: Mapping[str, Any], target: HubSchema) -> dict[str, Any]:
    """Translate the config of any flow-matching scheduler into the settings of one class.

    As in diffusers, a class takes from another one's config the settings that it has itself.

    Args:
        config: config of a scheduler of diffusers, named by its `_class_name`, or of a solver here.
        overrides: settings that replace the config's; the shift is `shift` or `flow_shift`.
        target: the class; also that of a config without `_class_name`.
    Returns: settings of the target, and `shift` if it is given.
    """
    source = str(config.get("_class_name", target.class_name))
    own = "shift" if source.startswith("FlowMatch") else "flow_shift"
    settings = {**config, **overrides}
    settings = {n: v for n, v in settings.items() if v not in target.foreign.get(n, ())}
    if own != "shift" and source not in [schema.class_name for schema in SCHEMAS]:
        settings.setdefault("prediction_type", "epsilon")  # as diffusers does
    # A config that diffusers has converted between classes may hold both names: the class's own one counts.
    names = (own, "shift" if own == "flow_shift" else "flow_shift")
    shifts = [mapping[name] for mapping in (overrides, config) for name in names if name in mapping]
    known = {"prediction_type", *target.defaults, *target.fixed} - set(names)
    # Not given, where the config was made, were these; what is lacking is so all the same.
    unsaid = set(config.get("_use_default_values", ())) - overrides.keys()
    taken = {n: v for n, v in settings.items() if n in known and (n not in unsaid or target.lacking({n: v}))}
    return taken | ({"shift": shifts[0]} if shifts else {})
