"""Each cache against its formula, written out as a loop of its own."""

import pytest
import torch
from diffusers import MagCacheConfig

from tests.builders import latents_of
from tests.golden_data import relative_error
from tests.pipelines.call.caches.loops import CALL, RATIOS, STEPS, cached, euler, written_out
from wan22 import CacheRatios, EasyCache, MagCache, TaylorCache

PASSES = ("cond", "uncond")
BOUND = 1e-5


def mean(x):
    return float(x.abs().mean())


def exact(place, warmup):
    return place["i"] < max(1, int(warmup * place["count"])) or place["last"]


def test_easy():
    known, counted = {}, []

    def predict(place, x, run):
        if place["i"] == 0:
            known.clear()
        skip = False
        if not exact(place, 0.25) and "rate" in known:
            known["change"] += known["rate"] * mean(x - known["before"]) / mean(known["v"]["cond"])
            skip = known["change"] < 0.4
        known["before"] = x
        counted.append(skip)
        if skip:
            return {name: x + known["v"][name] - known["x"] for name in PASSES}
        velocity = {name: run(x, name)[0] for name in PASSES}
        if "v" in known:
            known["rate"] = mean(velocity["cond"] - known["v"]["cond"]) / mean(x - known["x"])
        known.update(x=x, v=velocity, change=0.0)
        return velocity

    pipe = euler()
    expected = written_out(pipe, predict)
    found = cached(pipe, EasyCache(threshold=0.4, warmup=0.25))
    assert 2 <= sum(counted) < STEPS - 2
    assert relative_error(found, expected) < BOUND
    assert relative_error(latents_of(pipe, **CALL), expected) > 100 * BOUND


@pytest.mark.parametrize(("threshold", "most_skips"), [(0.07, 4), (0.15, 2), (1.0, 1)])
def test_mag(threshold, most_skips):
    known, counted = {}, []

    def predict(place, x, run):
        if place["i"] == 0:
            known.update(ratio=1.0, error=0.0, n=0)
        skip = False
        if not exact(place, 0.2):
            known["ratio"] *= RATIOS.resampled(place["slot"], place["count"])[place["i"]]
            known["n"] += 1
            known["error"] += abs(1 - known["ratio"])
            skip = known["error"] < threshold and known["n"] <= most_skips
        counted.append(skip)
        if skip:
            return {name: run(x, name, known[name])[0] for name in PASSES}
        known.update(ratio=1.0, error=0.0, n=0)
        velocity = {}
        for name in PASSES:
            velocity[name], known[name] = run(x, name)
        return velocity

    pipe = euler()
    expected = written_out(pipe, predict)
    found = cached(pipe, MagCache(threshold, most_skips, RATIOS, warmup=0.2))
    assert 2 <= sum(counted) < STEPS - 2
    assert relative_error(found, expected) < BOUND
    assert relative_error(latents_of(pipe, **CALL), expected) > 100 * BOUND


@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylor(order):
    known, counted = {}, []

    def predict(place, x, run):
        if place["i"] == 0:
            known.clear()
        skip = not exact(place, 0.45) and place["i"] - known["at"][-1] < 3
        counted.append(skip)
        if skip:
            at, velocity = known["at"], {}
            span = at[-1] - at[-2] if len(at) > 1 else 0
            ahead = min(place["i"] - at[-1], span)
            for name in PASSES:
                values = known[name]
                forecast = values[-1]
                if order >= 1 and len(values) > 1:
                    slope = (values[-1] - values[-2]) / span
                    forecast = forecast + ahead * slope
                if order == 2 and len(values) > 2:
                    bend = (slope - (values[-2] - values[-3]) / (at[-2] - at[-3])) / span
                    forecast = forecast + ahead**2 / 2 * bend
                velocity[name] = run(x, name, forecast)[0]
            return velocity
        known.setdefault("at", []).append(place["i"])
        velocity = {}
        for name in PASSES:
            velocity[name], residual = run(x, name)
            known.setdefault(name, []).append(residual)
        return velocity

    pipe = euler()
    expected = written_out(pipe, predict)
    found = cached(pipe, TaylorCache(interval=3, order=order, warmup=0.45))
    assert 3 <= sum(counted) < STEPS - 2
    assert relative_error(found, expected) < BOUND


def test_mag_is_that_of_diffusers_on_one_expert():
    """Where both mean the same: with the sum of errors never at the threshold, and the last step computed."""
    ratios = [1.0, *(0.97 for _ in range(STEPS - 2)), 0.2]
    ours = CacheRatios({"transformer": tuple(ratios)}, 5.0)
    pipe = euler(1)
    found = cached(pipe, MagCache(threshold=0.1, most_skips=2, warmup=0.25, ratios=ours))
    config = MagCacheConfig(
        threshold=0.1, max_skip_steps=2, retention_ratio=0.25, num_inference_steps=STEPS, mag_ratios=ratios
    )
    pipe.transformer.enable_cache(config)
    try:
        expected = latents_of(pipe, **CALL)
    finally:
        pipe.transformer.disable_cache()
    assert relative_error(found, expected) < BOUND
    assert relative_error(latents_of(pipe, **CALL), expected) > 100 * BOUND


def test_a_measured_ratio():
    """The mean over tokens of the quotients of the residual's norms, of both passes."""
    known, ratios = {}, {}

    def predict(place, x, run):
        velocity, quotients = {}, []
        for name in PASSES:
            velocity[name], residual = run(x, name)
            norms = residual.norm(dim=-1)
            if place["i"]:
                quotients.append(float((norms / known[name]).mean()))
            known[name] = norms
        ratios.setdefault(place["slot"], []).append(sum(quotients) / 2 if quotients else 1.0)
        return velocity

    pipe = euler()
    written_out(pipe, predict)
    found = pipe.calibrate_cache("a red circle", **{**call(), "seed": 7})
    assert found.shift == 5.0 and found.ratios.keys() == ratios.keys()
    for slot, values in ratios.items():
        torch.testing.assert_close(list(found.ratios[slot]), values, rtol=1e-4, atol=2e-6)


def call():
    from tests.builders import SMALL

    return SMALL | CALL
