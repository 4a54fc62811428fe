"""What scripts, callbacks and sampling loops written for diffusers' pipelines read, set and call."""

from typing import Any

from .attached.calls import Calls
from .call.state import of_call
from .loading.pipeline import LoadablePipeline


class DiffusersNames(LoadablePipeline):
    """Attributes of diffusers' WanPipeline that are not components: settings and state of the running call.

    In a callback they are those of the callback's own call, however many run at the same time.
    """

    calls: Calls

    _guidance_scale = of_call("guidance_scale", "What callbacks set: 1 or less turns guidance off.")
    _guidance_scale_2 = of_call("guidance_scale_2", "What loops copied from diffusers set.")
    _num_timesteps = of_call("num_timesteps", "What loops copied from diffusers set.")
    _current_timestep = of_call("current_timestep", "What loops copied from diffusers set.")
    _attention_kwargs = of_call("attention_kwargs", "What loops copied from diffusers set.")
    _interrupt = of_call("interrupt", "What callbacks set to end the call with the present latents.")

    guidance_scale = of_call("guidance_scale", "The high-noise expert's scale, or what was set since.", False)
    do_classifier_free_guidance = of_call("do_classifier_free_guidance", "Whether steps are guided.", False)
    num_timesteps = of_call("num_timesteps", "Model evaluations of the schedule.", False)
    current_timestep = of_call("current_timestep", "The running step's timestep, None outside a call.", False)
    attention_kwargs = of_call("attention_kwargs", "The call's attention_kwargs.", False)
    interrupt = of_call("interrupt", "Whether a callback asked to end the call.", False)

    @property
    def scheduler(self) -> Any:
        """The scheduler; in a callback its own call's, whose schedule is set.

        After a call it has that call's schedule, like diffusers'. A second call at the same time gets a copy.
        """
        mine = self.calls.mine
        return self.__dict__["scheduler"] if mine is None else mine.scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        # Where diffusers keeps components, and looks whether one is replaced.
        self.__dict__["scheduler"] = value
        if (mine := self.calls.mine) is not None:
            mine.scheduler = value
