"""Sampling loops written out, as the reference of step caches, and what caches are tested with."""

import torch

from tests.builders import SMALL, latents_of, random_pipeline
from wan22 import CacheRatios, FlowMatchEulerScheduler

STEPS = 12
CALL = {"num_inference_steps": STEPS}
# Every step of each expert but its first may be skipped.
RATIOS = CacheRatios({slot: (1.0, 0.97, 0.98, 0.95) for slot in ("transformer", "transformer_2")}, 5.0)


def euler(experts=2, **replaced):
    return random_pipeline(experts, scheduler=FlowMatchEulerScheduler(shift=5.0), **replaced)


def cached(pipe, cache, *arguments, **others):
    return latents_of(pipe, *arguments, **{**CALL, "cache": cache, **others})


def written_out(pipe, predict, prompt="a red circle", seed=7):
    """Sample by Euler's method; predict(place, x, run) returns the velocity of each pass.

    The place is the step's index within its expert, of how many; run(x, name, replace) calls the model for a
    pass, and returns the velocity and the blocks' residual, which `replace` is, if it is given.
    """
    scheduler = FlowMatchEulerScheduler(shift=5.0)
    scheduler.set_timesteps(STEPS)
    embeds = dict(zip(("cond", "uncond"), pipe.encode_prompt(prompt), strict=True))
    generator = torch.Generator().manual_seed(seed)
    x = pipe.prepare_latents(1, 16, SMALL["height"], SMALL["width"], SMALL["num_frames"], generator=generator)
    slots = ["transformer" if t >= 875 else "transformer_2" for t in scheduler.timesteps]
    for step, (t, slot) in enumerate(zip(scheduler.timesteps, slots, strict=True)):
        model, first = getattr(pipe, slot), slots.index(slot)
        scale = SMALL["guidance_scale" if slot == "transformer" else "guidance_scale_2"]

        def run(x, name, replace=None, model=model, t=t):
            return _run(model, x, t, embeds[name], replace)

        place = {"i": step - first, "count": slots.count(slot), "last": step == STEPS - 1, "slot": slot}
        velocity = predict(place, x, run)
        guided = velocity["uncond"] + scale * (velocity["cond"] - velocity["uncond"])
        x = scheduler.step(guided, t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def _run(model, x, t, text, replace):
    seen = {}

    def before(block, arguments):
        seen["in"] = arguments[0]

    def after(block, arguments, output):
        seen["out"] = output if replace is None else seen["in"] + replace
        return seen["out"]

    handles = [
        model.blocks[0].register_forward_pre_hook(before),
        model.blocks[-1].register_forward_hook(after),
    ]
    try:
        velocity = model(x, t.reshape(1), text, return_dict=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    return velocity, seen["out"] - seen["in"]
