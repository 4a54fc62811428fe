"""What a call may be asked for, what is refused, and what is known of checkpoints."""

import json
import logging

import diffusers
import pytest
import torch

import wan22
from tests.builders import SMALL, latents_of, random_components, random_pipeline
from tests.pipelines.call.caches.loops import CALL, RATIOS, STEPS, cached
from wan22 import CacheRatios, EasyCache, MagCache, TaylorCache
from wan22.pipelines.call.caches.places import places_of
from wan22.pipelines.call.caches.published import known_ratios
from wan22.pipelines.call.caches.settings import CACHES, LEVELS, cache_of
from wan22.pipelines.call.experts import Experts
from wan22.presets import I2V_A14B, T2V_A14B, TI2V_5B


def test_names_presets_and_plain_values(tmp_path):
    assert cache_of(None) is None
    for method, cls in CACHES.items():
        assert cache_of(method) == cache_of(f"{method}:medium") == cls.preset("medium")
        for level in LEVELS:
            cache = cache_of(f"{method}:{level}")
            assert type(cache) is cls and cache == cls.preset(level)
            assert cache_of(json.loads(json.dumps(cache.plain()))) == cache
    pair = EasyCache(threshold=[0.1, 0.2], warmup=(1, 0))
    assert pair.threshold == (0.1, 0.2) and cache_of(pair.plain()) == pair
    assert pair.at("threshold", "transformer") == 0.1 and pair.at("threshold", "transformer_2") == 0.2
    file = RATIOS.save(tmp_path / "ratios.json")
    expected = MagCache(**MagCache.presets["medium"], ratios=RATIOS)
    for given in (str(file), file, RATIOS, expected.plain(), MagCache(0.3, 3, str(file))):
        assert cache_of(given) == expected
    assert cache_of(expected.plain()).ratios == RATIOS
    assert len({hash(cache_of(f"{method}:{level}")) for method in CACHES for level in LEVELS}) == 9


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("eazy", "cache='eazy'"),
        ("easy:lowest", "the preset must be one of low, medium, high"),
        (3, "cache=3 must be a name such as 'easy:low'"),
        ({"method": "easy", "treshold": 1}, "treshold"),
        ({"threshold": 1}, "cache's method"),
        (
            {"method": "mag", "ratios": {"ratios": {"transformer": [1, -1]}}},
            r"transformer\[1\]=-1 must be above",
        ),
    ],
)
def test_what_is_no_cache(value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cached(random_pipeline(), value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EasyCache(threshold=-0.1), "threshold=-0.1"),
        (lambda: EasyCache(threshold=float("nan")), "threshold=nan"),
        (lambda: EasyCache(warmup=1.5), "warmup=1.5"),
        (lambda: EasyCache(threshold=(1, 2, 3)), "must be one value, or one for each expert"),
        (lambda: MagCache(most_skips=0), "most_skips=0"),
        (lambda: TaylorCache(interval=0), "interval=0"),
        (lambda: TaylorCache(order=3), "order=3"),
        (lambda: EasyCache.preset("lowest"), "preset='lowest'"),
    ],
)
def test_what_is_no_setting(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def stochastic():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)


def test_what_does_not_suit_a_call():
    pipe, cases = random_pipeline(), []
    cases += [({"num_inference_steps": 7}, "at least 8 steps, this one has 7")]
    cases += [({"sigmas": [1.0, 0.5]}, "at least 8 steps, this one has 2")]
    cases += [
        (
            {"distilled": "lightning-4", "num_inference_steps": None, "flow_shift": None},
            "each of so few steps",
        )
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            cached(pipe, "easy", **arguments)
    for make, message in (
        (
            lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=5.0),
            "HeunDiscreteScheduler does so twice",
        ),
        (stochastic, "FlowMatchEulerDiscreteScheduler does"),
        (lambda: diffusers.FlowMatchLCMScheduler(shift=5.0), "FlowMatchLCMScheduler does"),
    ):
        with pytest.raises(ValueError, match=message):
            cached(random_pipeline(scheduler=make()), "easy", flow_shift=None)
    with pytest.raises(ValueError, match="pairs are for checkpoints of two experts"):
        cached(random_pipeline(1), EasyCache(threshold=(0.1, 0.2)))


def test_what_does_not_suit_a_model():
    pipe = random_pipeline()
    pipe.transformer_2.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(ValueError, match=r"call disable_cache\(\)"):
            cached(pipe, "easy")
    finally:
        pipe.transformer_2.disable_cache()
    ours = random_components()["transformer"]
    theirs = diffusers.WanTransformer3DModel(**{k: v for k, v in ours.config.items() if k[0] != "_"})
    theirs.load_state_dict(ours.state_dict())
    pipe = random_pipeline(1, transformer=theirs)
    for cache in (TaylorCache(), MagCache(ratios=RATIOS)):
        with pytest.raises(ValueError, match="cache='easy' suits any"):
            cached(pipe, cache)
    assert cached(pipe, "easy").isfinite().all()


def test_unknown_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"pipe.calibrate_cache\(prompts\) measures them"):
        cached(random_pipeline(), "mag")
    with pytest.raises(ValueError, match="are those of transformer, and this call runs transformer_2"):
        cached(random_pipeline(), MagCache(ratios=CacheRatios({"transformer": (1.0, 0.9)}, 5.0)))


def test_ratios_of_another_shift_are_warned_of(caplog):
    for arguments, warned in (({}, False), ({"flow_shift": 7.0}, True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "wan22"):
            cached(random_pipeline(), MagCache(ratios=RATIOS), **arguments)
        assert ("measured with shift 5, this call has shift 7" in caplog.text) is warned
        assert ("pipe.calibrate_cache(prompts)" in caplog.text) is warned


def test_a_checkpoints_own_ratios_after_calibration(tmp_path):
    pipe = random_pipeline()
    arguments = {**SMALL, **CALL, "seed": 1}
    ratios = pipe.calibrate_cache(["a", "two squares"], **arguments)
    assert {slot: len(values) for slot, values in ratios.ratios.items()} == steps_of_experts(pipe)
    assert all(values[0] == 1 and all(0.2 < v < 5 for v in values) for values in ratios.ratios.values())
    assert ratios == pipe.calibrate_cache(["a", "two squares"], **arguments)
    file = ratios.save(tmp_path / "folder" / "ratios.json")
    assert CacheRatios.load(file) == ratios
    cache = MagCache(0.5, 3, ratios, warmup=0)
    video = pipe("a", **arguments, cache=cache)
    assert video.recipe.passes[0][0] < 2 * STEPS
    file.unlink()
    again = type(video.recipe).from_json(video.recipe.to_json())
    assert (pipe.reproduce(again).frames == video.frames).all(), "the recipe holds the ratios"


def steps_of_experts(pipe):
    scheduler = wan22.FlowMatchUniPCScheduler(shift=5.0)
    scheduler.set_timesteps(STEPS)
    places = places_of(Experts(pipe, 875).steps(scheduler))
    return {place.slot: place.count for place in places}


# ---- files ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no entry wan22_cache_ratios=1"),
        ("{", "Expecting property name"),
        ('{"wan22_cache_ratios": 2}', "no entry wan22_cache_ratios=1"),
        ('{"wan22_cache_ratios": 1}', "ratios must be a table"),
        ('{"wan22_cache_ratios": 1, "ratios": {}}', "ratios and warmup are by transformer"),
        ('{"wan22_cache_ratios": 1, "ratios": {"vae": [1]}}', "by transformer and transformer_2, not"),
        ('{"wan22_cache_ratios": 1, "ratios": {"transformer": []}}', "a list of 1 to 10000 numbers"),
        ('{"wan22_cache_ratios": 1, "ratios": {"transformer": [1, NaN]}}', r"transformer\[1\]=nan must be"),
        ('{"wan22_cache_ratios": 1, "ratios": {"transformer": [true]}}', r"transformer\[0\]=True must be"),
        ('{"wan22_cache_ratios": 1, "ratios": {"transformer": [1]}, "shift": 0}', "shift=0 must be"),
        ('{"wan22_cache_ratios": 1, "ratios": {"transformer": [1]}, "more": 0}', "more is no entry"),
        ('{"wan22_cache_ratios": 1, "ratios": ' + "[" * 100_000, "ratios.json has no ratios"),
        (" " * 2**21, "more than 1048576 bytes"),
    ],
)
def test_a_file_of_something_else(text, message, tmp_path):
    file = tmp_path / "ratios.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        cached(random_pipeline(), str(file))
    assert str(file) in str(caught.value) and len(str(caught.value)) < 1000


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        cached(random_pipeline(), str(tmp_path / "none.json"))


def test_a_recipe_from_outside_opens_no_file(tmp_path):
    """A name in it would be a file of this machine."""
    file = RATIOS.save(tmp_path / "ratios.json")
    pipe = random_pipeline()
    recipe = pipe("a", **SMALL | CALL | {"seed": 1}, cache=str(file)).recipe
    assert str(file) not in recipe.to_json()
    text = json.loads(recipe.to_json())
    text["call"]["cache"] = str(file)
    with pytest.raises(ValueError, match=r"call\.cache="):
        type(recipe).from_json(json.dumps(text))
    text["call"]["cache"] = {"method": "mag", "ratios": str(file)}
    with pytest.raises(ValueError, match="ratios"):
        pipe.reproduce(type(recipe).from_json(json.dumps(text)))


# ---- known checkpoints ----


@pytest.mark.parametrize(
    ("preset", "with_image", "counts", "last", "warmup"),
    [
        (T2V_A14B, False, (26, 14), 0.8026, (0.4, 0.4)),
        (I2V_A14B, True, (15, 25), 0.7982, (1.0, 0.1)),
        (TI2V_5B, False, (50,), 0.9695, (0.2,)),
        (TI2V_5B, True, (50,), 0.9666, (0.2,)),
    ],
)
def test_published_ratios(preset, with_image, counts, last, warmup):
    """Each expert has as many as the official schedule has steps for it."""
    known = known_ratios(preset.name, with_image)
    assert known.shift == preset.flow_shift and sum(counts) == preset.num_inference_steps
    assert tuple(map(len, known.ratios.values())) == counts
    assert tuple(known.warmup.values()) == warmup
    assert list(known.ratios.values())[-1][-1] == last
    assert all(values[0] == 1 and min(values) > 0.79 for values in known.ratios.values()), "no switch"
    assert CacheRatios.of(known.plain(), "") == known
    scheduler = wan22.FlowMatchUniPCScheduler(shift=preset.flow_shift)
    scheduler.set_timesteps(preset.num_inference_steps)
    if preset.boundary_ratio is not None:
        high = sum(t >= 1000 * preset.boundary_ratio for t in scheduler.timesteps.tolist())
        assert high == counts[0]


@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_the_miniatures_ship_theirs(task):
    known = known_ratios(f"tiny-{task}", task == "i2v")
    assert known.checkpoint == f"tiny-{task}" and known.shift == 3.0
    assert sum(map(len, known.ratios.values())) == 20
    assert known_ratios("tiny-other", False) is None and known_ratios("Wan2.1-T2V-14B", False) is None


def test_ratios_for_other_numbers_of_steps():
    ratios = CacheRatios({"transformer": (1.0, 0.9, 0.8, 0.7, 0.6)})
    assert ratios.resampled("transformer", 5) == [1.0, 0.9, 0.8, 0.7, 0.6]
    assert ratios.resampled("transformer", 3) == [1.0, 0.8, 0.6]
    assert ratios.resampled("transformer", 9) == [1.0, 1.0, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6]
    assert ratios.resampled("transformer", 1) == [1.0]


def test_threads_do_not_share_what_they_keep():
    from concurrent.futures import ThreadPoolExecutor

    pipe, cache = random_pipeline(), TaylorCache(interval=3, warmup=0)
    alone = [cached(pipe, cache, seed=seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda seed: cached(pipe, cache, seed=seed), range(2)))
    assert all(map(torch.equal, together, alone))
    assert not torch.equal(alone[0], latents_of(pipe, **CALL, seed=0))
