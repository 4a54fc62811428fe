"""Each guidance formula: the published one, written anew in float64, and diffusers' classes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import guiders

from wan22.guidance import (
    APG,
    NAG,
    TCFG,
    CFGZeroStar,
    ClassifierFreeGuidance,
    Gated,
    MamboG,
    Rescale,
    SkipLayer,
)
from wan22.pipelines.call.guidance.named import GUIDERS, as_guider, recorded

SHAPE = (1, 4, 3, 5, 6)


def predictions(seed=0, names=("cond", "uncond")):
    """Predictions that have most in common, as those of a model."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(SHAPE, generator=generator)
    return {name: common + 0.3 * torch.randn(SHAPE, generator=generator) for name in names}


def step(index=5, count=20):
    return SimpleNamespace(index=index, count=count, timestep=torch.tensor(500.0))


def guided(guider, predicted, scale=4.0, memory=None, at=None):
    return guider.combine(predicted, scale, at or step(), {} if memory is None else memory)


def wide(predicted):
    return [e.double().numpy() for e in predicted.values()]


def close(found, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected)
    assert found.dtype == torch.float32
    assert torch.linalg.vector_norm(found.double() - expected) <= tolerance * torch.linalg.vector_norm(
        expected
    )


# ---- by formulas of their own ----


def test_plain():
    c, u = wide(predicted := predictions())
    close(guided(ClassifierFreeGuidance(), predicted), u + 4 * (c - u))


def test_cfg_zero_star():
    c, u = wide(predicted := predictions())
    s = np.vdot(c, u) / (np.vdot(u, u) + 1e-8)
    close(guided(CFGZeroStar(), predicted), (1 - 4) * s * u + 4 * c)
    assert abs(s - 1) > 0.01, "or it is plain guidance"


@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize("threshold", [None, 2.9, 0.1])
@pytest.mark.parametrize("momentum", [0.0, -0.75])
def test_apg(eta, threshold, momentum):
    guider, memory, average = APG(eta, threshold, momentum), {}, np.zeros(SHAPE)
    for i in range(3):
        c, u = wide(predicted := predictions(i))
        average = (c - u) + momentum * average
        expected = np.empty_like(c)
        for t in range(SHAPE[2]):
            d, base = average[:, :, t].ravel(), c[:, :, t].ravel()
            norm = np.linalg.norm(d)
            d = d if threshold is None or norm <= threshold else d * threshold / norm
            along = (d @ base) / (base @ base) * base
            v = base + 3 * (d - along) + 3 * eta * along
            expected[:, :, t] = v.reshape(c[:, :, t].shape)
        close(guided(guider, predicted, memory=memory), expected)


def test_tcfg():
    c, u = wide(predicted := predictions())
    rows = np.stack([c.ravel(), u.ravel()])
    _, _, vectors = np.linalg.svd(rows, full_matrices=False)
    u = (vectors[0] @ rows[1] * vectors[0]).reshape(SHAPE)
    close(guided(TCFG(), predicted), u + 4 * (c - u))


@pytest.mark.parametrize(
    ("c", "u"), [(1.0, 2.0), (1.0, 1.0), (-2.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
)
def test_tcfg_of_parallel_predictions_is_plain(c, u):
    direction = predictions()["cond"]
    predicted = {"cond": c * direction, "uncond": u * direction}
    torch.testing.assert_close(guided(TCFG(), predicted), guided(ClassifierFreeGuidance(), predicted))


def test_mambo_g():
    c, u = wide(predicted := predictions())
    g = 1 + 3 * np.exp(-2.0 * np.linalg.norm(c - u) / np.linalg.norm(u))
    close(guided(MamboG(alpha=2.0), predicted), u + g * (c - u))
    close(guided(MamboG(alpha=0.0), predicted), u + 4 * (c - u))


def test_rescale():
    c, u = wide(predicted := predictions())
    v = u + 4 * (c - u)
    close(guided(Rescale(phi=0.6), predicted), 0.6 * v * c.std() / v.std() + 0.4 * v)
    assert torch.equal(guided(Rescale(phi=0.0), predicted), guided(ClassifierFreeGuidance(), predicted))


def test_skipped_layers():
    c, u, skip = wide(predicted := predictions(names=("cond", "uncond", "skip")))
    close(guided(SkipLayer(scale=1.5), predicted), u + 4 * (c - u) + 1.5 * (c - skip))
    del predicted["uncond"]
    close(guided(SkipLayer(scale=1.5), predicted, 1), c + 1.5 * (c - skip))


@pytest.mark.parametrize("guider", [ClassifierFreeGuidance(), CFGZeroStar(), TCFG(), MamboG(), APG()])
def test_gating(guider):
    """The later velocity is that of the difference from before."""
    first, second, memory = predictions(0), predictions(1), {}
    gated = Gated(guider)
    plain_memory = {}
    assert torch.equal(guided(gated, first, memory=memory), guided(guider, first, memory=plain_memory))
    u = second["cond"] - (first["cond"] - first["uncond"])
    expected = guided(guider, second | {"uncond": u}, memory=plain_memory)
    close(guided(gated, {"cond": second["cond"]}, memory=memory, at=step(15)), expected.double())
    if guider == ClassifierFreeGuidance():
        delta = (first["cond"] - first["uncond"]).double()
        close(guided(gated, {"cond": second["cond"]}, memory=memory), second["cond"].double() + 3 * delta)


@pytest.mark.parametrize("name", GUIDERS)
def test_without_a_second_prediction_it_is_the_first(name):
    predicted = {"cond": predictions()["cond"]}
    assert guided(as_guider(name), predicted, 1) is predicted["cond"]


# ---- by diffusers' classes ----


def of_diffusers(guider, predicted, index=5, count=20):
    guider.set_state(index, count, torch.tensor(500.0))
    return guider(guider.prepare_inputs({"noise_pred": tuple(predicted.values())})).pred


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ClassifierFreeGuidance(), guiders.ClassifierFreeGuidance(4.0)),
        (CFGZeroStar(zero_steps=1), guiders.ClassifierFreeZeroStarGuidance(4.0)),
        (TCFG(), guiders.TangentialClassifierFreeGuidance(4.0)),
        (Rescale(phi=0.4), guiders.ClassifierFreeGuidance(4.0, guidance_rescale=0.4)),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_it_is_that_of_diffusers(ours, theirs):
    predicted = predictions()
    expected = of_diffusers(theirs, predicted)
    torch.testing.assert_close(guided(ours, predicted), expected, rtol=1e-5, atol=1e-5)


def test_mambo_g_is_that_of_diffusers():
    """Its norms fail on videos, and are the same of a plain vector."""
    predicted = predictions()
    theirs = guiders.MagnitudeAwareGuidance(4.0, alpha=3.0)
    expected = of_diffusers(theirs, {name: p.flatten(1) for name, p in predicted.items()})
    torch.testing.assert_close(guided(MamboG(alpha=3.0), predicted), expected.view(SHAPE))


@pytest.mark.parametrize("momentum", [None, -0.5])
def test_apg_is_that_of_diffusers(momentum):
    """Its original formulation counts the scale from 0."""
    options = {"adaptive_projected_guidance_norm_dim": (-1, -2, -4), "use_original_formulation": True}
    options |= {"adaptive_projected_guidance_momentum": momentum, "adaptive_projected_guidance_rescale": 2.9}
    theirs, ours, memory = (
        guiders.AdaptiveProjectedGuidance(3.0, eta=0.3, **options),
        APG(0.3, 2.9, momentum or 0.0),
        {},
    )
    for i in range(3):
        predicted = predictions(i)
        expected = of_diffusers(theirs, predicted, i)
        torch.testing.assert_close(guided(ours, predicted, memory=memory), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1, 3, 4, 10])
def test_skipped_layers_are_those_of_diffusers(index):
    options = {"skip_layer_guidance_layers": [9], "skip_layer_guidance_start": 0.0}
    theirs = guiders.SkipLayerGuidance(4.0, skip_layer_guidance_scale=1.5, **options)
    ours = SkipLayer(scale=1.5, start=0.05, stop=0.2)  # theirs starts a step after its start
    at = step(index)
    names = tuple(ours.passes(at, 4.0, None))
    theirs.set_state(index, 20, torch.tensor(500.0))
    assert len(names) == theirs.num_conditions
    predicted = predictions(names=names)
    expected = theirs.forward(*predicted.values()).pred
    torch.testing.assert_close(guided(ours, predicted, at=at), expected, rtol=1e-5, atol=1e-5)


# ---- which passes a step needs ----


def test_zero_steps():
    needed = [len(CFGZeroStar().passes(step(i, 50), 4.0, None)) for i in range(4)]
    assert needed == [0, 0, 2, 2], "4 % of the steps"
    assert [len(CFGZeroStar().passes(step(i, 8), 4.0, None)) for i in range(2)] == [2, 2]
    assert [len(CFGZeroStar(1).passes(step(i, 8), 4.0, None)) for i in range(2)] == [0, 2]
    assert list(CFGZeroStar(3).passes(step(0, 8), 1, None)) == ["cond"], "without guidance nothing is zero"


def test_gates():
    needed = [list(Gated(after=0.5).passes(step(i, 8), 4.0, 1)) for i in range(8)]
    assert needed == [["cond", "uncond"]] * 4 + [["cond"]] * 4
    assert list(Gated(after=0.5).passes(step(7, 8), 4.0, None)) == ["cond", "uncond"], "none is known"
    refreshed = [list(Gated(after=0.5, refresh=2).passes(step(7, 8), 4.0, since)) for since in (1, 2, 3)]
    assert refreshed == [["cond"], ["cond"], ["cond", "uncond"]]


# ---- settings ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CFGZeroStar(-1), "zero_steps=-1 must be an int, at least 0"),
        (lambda: APG(eta=2), "eta=2 must be a number, 0 or more, at most 1; the nearest is 1"),
        (lambda: APG(threshold=0), "threshold=0 must be a number, above 0; None sets no limit"),
        (lambda: APG(momentum=float("nan")), "momentum=nan must be a finite number"),
        (lambda: MamboG(alpha=-1), "alpha=-1 must be a number, 0 or more"),
        (lambda: Rescale(phi=1.5), "phi=1.5 must be a number"),
        (lambda: Gated(after=-0.5), "after=-0.5 must be a number"),
        (lambda: Gated(refresh=0), "refresh=0 must be an int, at least 1"),
        (lambda: NAG(scale=0.5), "scale=0.5 must be a number, 1 or more; 1 changes nothing"),
        (lambda: NAG(tau=0), "tau=0 must be a number, above 0"),
        (lambda: NAG(alpha=2), "alpha=2 must be a number"),
        (lambda: SkipLayer(layers=[]), "layers=[] must be the index of a layer, or several"),
        (lambda: SkipLayer(layers="9"), "layers='9' must be the index of a layer, or several"),
        (lambda: SkipLayer(layers=(1, -1)), "layers=-1 must be an int, at least 0"),
        (lambda: SkipLayer(start=0.5, stop=0.2), "stop=0.2 must be a number, 0.5 or more"),
        (lambda: as_guider("appg"), "guidance='appg' must be one of .*; the nearest is 'apg'"),
        (lambda: as_guider("cfg-zero"), "the nearest is 'cfg-zero\\*'"),
        (lambda: as_guider({"name": "nagg"}), "guidance: name='nagg' must be one .*; the nearest is 'nag'"),
        (lambda: as_guider({"eta": 0.5}), "guidance: name=None must be one of"),
        (
            lambda: as_guider({"name": "apg", "etta": 1}),
            "guidance 'apg' has no argument etta; the nearest is eta",
        ),
        (lambda: as_guider({"name": "apg", "eta": "1"}), "eta='1' must be a number"),
        (lambda: as_guider('{"name": '), "must be a name, or JSON such as"),
        (lambda: as_guider(4.0), "guidance=4.0 must be a name, an object of wan22.guidance, or a guider"),
        (
            lambda: as_guider(Gated("nag")),
            "'gated' works with the passes of two prompts, and 'nag' has only one",
        ),
        (lambda: as_guider(Gated("agp")), "guidance='agp' must be one of"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message.replace("[]", "\\[\\]")):
        make()


@pytest.mark.parametrize(
    "guider",
    [
        APG(eta=0.5),
        NAG(tau=3),
        CFGZeroStar(2),
        Gated(Rescale("apg", phi=0.5), after=0.3),
        SkipLayer(layers=[3, 1]),
    ],
    ids=lambda guider: guider.name,
)
def test_settings_as_plain_values(guider):
    guider = as_guider(guider)
    table = recorded(guider)
    assert table["name"] == guider.name
    assert as_guider(table) == guider == as_guider(guider)
    assert recorded(as_guider(None)) is recorded(as_guider("cfg")) is None


def test_names_and_objects():
    assert as_guider("gated") == as_guider(Gated()) == as_guider('{"name": "gated"}')
    assert as_guider(Gated("cfg-zero*")).guider == CFGZeroStar()
    assert SkipLayer(layers=4).layers == (4,)
