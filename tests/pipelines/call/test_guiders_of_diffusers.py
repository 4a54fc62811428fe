"""diffusers' guiders in a call: those that work with predictions alone, and classes of the caller's own."""

import pytest
import torch
from diffusers import guiders

from tests.builders import SMALL
from tests.pipelines.call.test_guidance import latents
from wan22.guidance import Gated, Guider
from wan22.pipelines.call.guidance.guider import UNGUIDED
from wan22.video.recipe import Recipe


def own(pipe, guider, **options):
    """Latents by a guider, whose scale is its own."""
    return latents(pipe, guidance=guider, guidance_scale=None, guidance_scale_2=None, **options)


def test_a_guider_of_diffusers(pipe):
    expected = latents(pipe, guidance_scale=3.0, guidance_scale_2=3.0)
    assert torch.equal(own(pipe, guiders.ClassifierFreeGuidance(3.0)), expected)
    gated = latents(pipe, guidance=Gated(), guidance_scale=3.0, guidance_scale_2=3.0)
    assert torch.equal(own(pipe, Gated(guiders.ClassifierFreeGuidance(3.0))), gated)
    inside = latents(pipe, guidance_scale=3.0, guidance_scale_2=3.0, guidance_interval=(0.25, 0.75))
    assert torch.equal(own(pipe, guiders.ClassifierFreeGuidance(3.0, start=0.25, stop=0.75)), inside)


OF_DIFFUSERS = {
    "apg": lambda: guiders.AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5),
    "original apg": lambda: guiders.AdaptiveProjectedGuidance(1.0, use_original_formulation=True),
    "mix": lambda: guiders.AdaptiveProjectedMixGuidance(3.0, adaptive_projected_guidance_start_step=2),
    "zero": lambda: guiders.ClassifierFreeZeroStarGuidance(3.0),
    "tcfg": lambda: guiders.TangentialClassifierFreeGuidance(3.0),
}


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_guiders_of_diffusers_in_a_call(pipe, name):
    guider = OF_DIFFUSERS[name]()
    both = own(pipe, guider, prompt=["a red circle", "b"])
    assert torch.equal(own(pipe, guider, prompt=["a red circle", "b"]), both), "nothing is kept"
    assert torch.equal(own(pipe, OF_DIFFUSERS[name](), prompt="b", seed=8), both[1:])
    assert not torch.equal(both[:1], latents(pipe))
    call = {**SMALL, "guidance_scale": None, "guidance_scale_2": None, "seed": 1}
    video = pipe("a", **call, guidance=guider)
    table = video.recipe.call["guidance"]
    assert (table["name"], table["class"]) == ("diffusers", type(guider).__name__)
    assert pipe.reproduce(Recipe.from_json(video.recipe.to_json())) == video


def test_guiders_that_do_not_fit_are_refused(pipe):
    hooked = guiders.SkipLayerGuidance(skip_layer_guidance_layers=[0])
    for guider in (hooked, guiders.PerturbedAttentionGuidance(perturbed_guidance_layers=[0])):
        with pytest.raises(
            ValueError, match=f"{type(guider).__name__} changes the transformer between passes"
        ):
            own(pipe, guider)
    with pytest.raises(ValueError, match="MagnitudeAwareGuidance fails on videos: linalg"):
        own(pipe, guiders.MagnitudeAwareGuidance(3.0))
    changed = guiders.ClassifierFreeGuidance(3.0)
    changed.guidance_scale = 5.0
    with pytest.raises(ValueError, match=r"guidance_scale of the Class.* has been changed, .*new"):
        own(pipe, changed)
    off = guiders.ClassifierFreeGuidance(3.0)
    off.disable()
    with pytest.raises(ValueError, match="enabled of the ClassifierFreeGuidance has been changed"):
        own(pipe, off)
    with pytest.raises(ValueError, match=r"=3\.0, and guidance='diffusers' runs at a scale of 5"):
        latents(pipe, guidance=guiders.ClassifierFreeGuidance(5.0))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"class": "AutoGuidanc"},
            "guidance: class='AutoGuidanc' must be one of .*; the nearest is 'AutoGuidance'",
        ),
        ({"class": "BaseGuidance"}, "guidance: class='BaseGuidance' must be one of"),
        ({"class": "ClassifierFreeGuidance", "config": {"scale": 2}}, "is not ClassifierFreeGuidance's"),
        (
            {"class": "ClassifierFreeGuidance", "config": 3},
            "guidance: config=3 is not ClassifierFreeGuidance's",
        ),
        ({}, "guidance: class=None must be one of"),
    ],
)
def test_what_a_recipe_says_of_them_is_checked(pipe, table, message):
    with pytest.raises(ValueError, match=message):
        own(pipe, {"name": "diffusers", **table})


def test_classes_of_the_callers_own(pipe):
    """They work, and no recipe holds them."""

    class Theirs(guiders.ClassifierFreeGuidance):
        pass

    class Ours(Guider):
        def passes(self, step, scale, since):
            return UNGUIDED

    call = {**SMALL, "guidance_scale": None, "guidance_scale_2": None, "seed": 1, "output_type": "latent"}
    for guidance in (Theirs(3.0), Gated(Theirs(3.0))):
        video = pipe("a", **call, guidance=guidance)
        with pytest.raises(ValueError, match="guidance is a Theirs, a class of"):
            pipe.reproduce(video.recipe)
    unguided = latents(pipe, guidance_scale=1.0, guidance_scale_2=1.0)
    assert torch.equal(latents(pipe, guidance=Ours()), unguided)
