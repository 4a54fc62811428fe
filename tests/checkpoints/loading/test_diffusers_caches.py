"""Step caches of diffusers on our transformer: they skip work, and give what they give on diffusers'."""

import copy

import diffusers
import pytest
import torch
from diffusers.hooks import SeaCacheConfig, TaylorSeerCacheConfig

from tests.builders import latents_of, random_pipeline
from tests.golden_data import relative_error
from tests.models.test_transformer import SMALL, random_inputs, random_model

STEPS = 8
CONFIG = SMALL | {"num_layers": 3}


class Clock:
    """What tells attention caches the time."""

    now = 0.0

    def __call__(self):
        return self.now


CLOCK = Clock()


def pyramid(**changed):
    settings = {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 3}
    return diffusers.PyramidAttentionBroadcastConfig(
        **settings | changed,
        spatial_attention_timestep_skip_range=(100, 990),
        cross_attention_timestep_skip_range=(100, 990),
        current_timestep_callback=CLOCK,
    )


def faster(distilled=True):
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        is_guidance_distilled=distilled,
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BCFHW",
        current_timestep_callback=CLOCK,
    )


def taylor(**changed):
    settings = {"cache_interval": 2, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
    return TaylorSeerCacheConfig(**settings | changed)


CACHES = {
    "pyramid attention broadcast": (pyramid, "attn1"),
    "FasterCache": (faster, "attn1"),
    "FirstBlockCache": (lambda: diffusers.FirstBlockCacheConfig(threshold=0.2), "attn2"),
    "MagCache": (
        lambda: diffusers.MagCacheConfig(
            threshold=0.5,
            max_skip_steps=2,
            retention_ratio=0.2,
            num_inference_steps=STEPS,
            mag_ratios=[1.0] * STEPS,
        ),
        "attn2",
    ),
    "SeaCache": (lambda: SeaCacheConfig(threshold=10.0), "attn2"),
    "TaylorSeer": (lambda: taylor(cache_identifiers=[r"blocks\.\d+\.attn[12]"]), "attn2.to_q"),
    "TaylorSeer of blocks": (lambda: taylor(cache_identifiers=[r"blocks\.\d+"]), "attn2"),
    "TaylorSeer, lite": (lambda: taylor(use_lite_mode=True), "attn2"),
}


def steps(model, layer, name="cond"):
    """Return the outputs of a run of a few steps, and how often the second block's layer ran in it."""
    calls = []
    hook = model.get_submodule(f"blocks.1.{layer}.to_out.0" if layer[-1].isdigit() else f"blocks.1.{layer}")
    handle = hook.register_forward_hook(lambda *_: calls.append(1))
    inputs, outputs = random_inputs(CONFIG), []
    noise = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for index in range(STEPS):
            CLOCK.now = 995.0 - index * 120
            inputs["timestep"] = torch.tensor([CLOCK.now])
            inputs["hidden_states"] = inputs["hidden_states"] + 0.05 * noise
            state = {"step_index": index, "sigma": CLOCK.now / 1000, "num_inference_steps": STEPS}
            with model.cache_context(name, **state):
                outputs.append(model(**inputs, return_dict=False)[0].clone())
    handle.remove()
    return torch.stack(outputs), len(calls)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_skips_what_it_skips_in_diffusers(name):
    make, layer = CACHES[name]
    ours = random_model(CONFIG)
    theirs = diffusers.WanTransformer3DModel(**CONFIG).eval()
    theirs.load_state_dict(ours.state_dict())
    plain, all_calls = steps(ours, layer)
    assert all_calls == STEPS
    ours.enable_cache(make())
    theirs.enable_cache(make())
    found, calls = steps(ours, layer)
    expected, their_calls = steps(theirs, layer)
    assert calls == their_calls < STEPS
    assert relative_error(found, expected) < 1e-5
    assert not torch.equal(found, plain)
    ours.disable_cache()
    again, all_calls = steps(ours, layer)
    assert torch.equal(again, plain)
    assert all_calls == STEPS


def test_attention_is_kept_by_pass():
    """In turns, as with guidance, each pass gets its own; diffusers gives it the other's."""
    model = random_model(CONFIG)
    inputs = random_inputs(CONFIG)
    other = inputs | {"encoder_hidden_states": -inputs["encoder_hidden_states"]}

    def run(passes):
        outputs = []
        model.enable_cache(pyramid(cross_attention_block_skip_range=2))
        with torch.no_grad():
            for index in range(4):
                CLOCK.now = 900.0 - index * 100
                for name, given in passes.items():
                    with model.cache_context(name):
                        outputs.append(model(**given, timestep=torch.tensor([CLOCK.now])).sample)
        model.disable_cache()
        return outputs

    inputs.pop("timestep"), other.pop("timestep")
    both = run({"cond": inputs, "uncond": other})
    assert torch.equal(torch.stack(both[::2]), torch.stack(run({"cond": inputs})))
    assert torch.equal(torch.stack(both[1::2]), torch.stack(run({"uncond": other})))


@pytest.mark.parametrize("make", [pyramid, faster])
def test_videos_of_one_call_keep_their_own_attention_in_a_model_of_diffusers(make):
    pipe = random_pipeline(experts=1)
    model = diffusers.WanTransformer3DModel.from_config(pipe.transformer.config).eval()
    pipe.transformer = model
    pipe.register_to_config(boundary_ratio=None)
    CLOCK.now = 995.0

    def tick(p, index, timestep, tensors):
        CLOCK.now = 600.0 - index

    arguments = {"num_inference_steps": 4, "callback_on_step_end": tick}
    alone = [latents_of(pipe, text, seed=seed, **arguments) for text, seed in (("a", 1), ("b", 2))]
    model.enable_cache(make())
    cached = []
    for texts, seeds in ((["a"], [1]), (["b"], [2]), (["a", "b"], [1, 2])):
        CLOCK.now = 995.0
        cached.append(latents_of(pipe, texts, seed=seeds, **arguments))
    assert torch.equal(torch.cat(cached[:2]), cached[2])
    assert not any(map(torch.equal, alone, cached[2].split(1)))


def test_a_cache_is_reset_and_empty_between_calls():
    pipe = copy.deepcopy(random_pipeline(experts=1))
    plain = made(pipe)
    pipe.transformer.enable_cache(pyramid())
    CLOCK.now = 500.0
    first = made(pipe)
    assert not torch.equal(first, plain)
    assert torch.equal(made(pipe), first)
    registry = pipe.transformer.blocks[0].attn1._diffusers_hook
    assert registry.hooks["pyramid_attention_broadcast"].state.states == {}
    settings = pipe.acceleration.changes()["step_cache"]["PyramidAttentionBroadcastConfig"]["transformer"]
    assert settings["cross_attention_block_skip_range"] == str(pyramid().cross_attention_block_skip_range)


def made(pipe):
    arguments = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "seed": 1}
    return pipe("a", **arguments, guidance_scale=3.0, output_type="latent").frames


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (diffusers.hooks.TextKVCacheConfig(), "leave it out"),
        (taylor(), "TaylorSeerCacheConfig fits no layer of a Wan transformer"),
        (
            pyramid(spatial_attention_block_identifiers=["layers"], cross_attention_block_skip_range=None),
            "fits no",
        ),
    ],
)
def test_what_cannot_take_effect_is_refused(config, why):
    model = random_model(CONFIG)
    with pytest.raises(ValueError, match=why):
        model.enable_cache(config)
    assert not model.is_cache_enabled
    model.enable_cache(pyramid())


def test_sea_cache_for_images_needs_to_be_told_the_latents():
    model = random_model(CONFIG | {"in_channels": 36})
    with pytest.raises(ValueError, match="give raw_vision_callback"):
        model.enable_cache(SeaCacheConfig())
    model.enable_cache(SeaCacheConfig(raw_vision_callback=lambda m, a, k: list(k["hidden_states"][:, :16])))


def test_a_cache_for_batched_guidance_is_refused_before_the_run():
    pipe = copy.deepcopy(random_pipeline(experts=1))
    pipe.transformer.enable_cache(faster(distilled=False))
    with pytest.raises(ValueError, match="run one after the other here; is_guidance_distilled=True"):
        made(pipe)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(faster())
    made(pipe)
