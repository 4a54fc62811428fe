"""Our classes under the names that model_index.json gives them.

diffusers imports the module that model_index.json names for each component and takes the class from there;
`LoadablePipeline.load_config` makes it read "diffusers" as this module.
"""

from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ...checkpoints.loading.fill import empty_weights
from ...checkpoints.loading.models import AutoencoderKLWan, WanTransformer3DModel
from ...checkpoints.naming.names import shapes_of
from ...schedulers import FlowMatchDPMSolverScheduler as DPMSolverMultistepScheduler
from ...schedulers import FlowMatchEulerScheduler as FlowMatchEulerDiscreteScheduler
from ...schedulers import FlowMatchUniPCScheduler as UniPCMultistepScheduler

# The two mixins are how diffusers tells models from schedulers.
__all__ = [
    "AutoencoderKLWan",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "ModelMixin",
    "SchedulerMixin",
    "UniPCMultistepScheduler",
    "WanTransformer3DModel",
]
_MODELS = {"WanTransformer3DModel": WanTransformer3DModel, "AutoencoderKLWan": AutoencoderKLWan}
_VAE_SETTINGS = {"use_slicing", "use_tiling"} | {
    f"tile_sample_{what}_{axis}" for what in ("min", "stride") for axis in ("height", "width")
}


def from_diffusers_model(component: Any) -> Any:
    """Return our model for one of diffusers' own, sharing its weights; anything else as it is.

    A ValueError says if a LoRA, a quantiser or the like has changed the model since it was loaded.
    """
    name = type(component).__name__
    ours = _MODELS.get(name)
    if ours is None or isinstance(component, ours):
        return component
    with empty_weights():
        model = ours.from_config(component.config)
    weights = component.state_dict()
    if shapes_of(weights) != shapes_of(model.state_dict()):
        raise ValueError(
            f"this {name} of diffusers was changed since it was loaded; load it with wan22.{name}"
        )
    model.load_state_dict(weights, assign=True)
    for setting in _VAE_SETTINGS & vars(component).keys():
        setattr(model, setting, getattr(component, setting))
    return model.eval()
