"""Plans know the passes of a step: how many, of which layers, and which of them attend to two texts."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.accel.planning.test_planner import SIZE, plan_in
from tests.builders import SMALL, latents_of, random_i2v_pipeline, random_pipeline
from tests.cli.commands import run
from wan22.accel.offload.layout import Placement
from wan22.accel.planning.costs import Task, forward_flops
from wan22.accel.planning.machine import Machine
from wan22.accel.planning.meta_models import meta_copies
from wan22.accel.planning.passes import GUIDED, PLAIN, UNGUIDED, PassKind, covers, grouped, most_of
from wan22.accel.planning.planner import _step_seconds
from wan22.accel.planning.trace import peak_bytes
from wan22.guidance import NAG, Gated, SkipLayer
from wan22.models.attention_guidance import AttentionGuidance
from wan22.pipelines.call import phases
from wan22.presets import MAX_TEXT_TOKENS

AWAY = PassKind(attention=AttentionGuidance(5.0, 2.5, 0.25))
SKIPS = PassKind(skip_layers=(1,))
LATENTS = (2, 16, 16)  # "t h w" of 128x128 and 5 frames


def task_of(pipe, passes, **options):
    return Task("a", meta_copies(pipe.components), (128, 128, 5), None, passes, **options)


def arguments(model, kind, samples=1, device="meta"):
    text = torch.zeros(samples, MAX_TEXT_TOKENS, model.config.text_dim, device=device)
    given = {
        "hidden_states": torch.zeros(samples, model.config.in_channels, *LATENTS, device=device),
        "timestep": torch.zeros(samples, device=device),
        "encoder_hidden_states": text,
        "return_dict": False,
    }
    if kind.attention is not None:
        given |= {"encoder_hidden_states_negative": text, "attention_guidance": kind.attention}
    return given | {"skip_layers": kind.skip_layers}


def attention_flops(query, key, value, *arguments, out_shape=None, **others):
    """Those of two matrix products, for the operation that FlopCounterMode does not know."""
    batch, heads, tokens, width = query
    return 4 * batch * heads * tokens * key[2] * width


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


@pytest.mark.parametrize("kind", [AWAY, SKIPS], ids=["nag", "slg"])
def test_arithmetic_is_what_is_counted(kind):
    """The difference to a plain pass, which embeddings have no part in but for a second text's."""
    pipe = random_pipeline()
    task, model, counted = task_of(pipe, (PLAIN, kind)), pipe.transformer, []
    for each in (PLAIN, kind):
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        with counter, torch.no_grad():
            model(**arguments(model, each, device="cpu"))
        counted.append(counter.get_total_flops())
    config = model.config
    planned = [forward_flops(config, task.tokens, each) for each in (PLAIN, kind)]
    dim = config.num_attention_heads * config.attention_head_dim
    embedding = 2 * MAX_TEXT_TOKENS * (config.text_dim * dim + dim * dim) if kind is AWAY else 0
    assert counted[1] - counted[0] - embedding == planned[1] - planned[0] != 0
    assert task.step_flops() == sum(planned)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("passes", [UNGUIDED, GUIDED, (AWAY,), (*GUIDED, SKIPS)], ids=str)
def test_memory_is_that_of_the_passes(passes, in_turn):
    """Two videos: what a step allocates, its results being kept, beside the copies of the latents."""
    task = task_of(random_pipeline(), passes, videos=2)
    model = task.models["transformer"]
    model.set_samples_in_turn(in_turn)

    def step():
        kept = []
        for kind, count in grouped(passes):
            runs = [count * 2] if in_turn else [1] * count
            kept += [model(**arguments(model, kind._replace(skip_layers=()), n))[0] for n in runs]

    latents = 2 * 12 * 16 * torch.Size(LATENTS).numel() * 4
    inputs = peak_bytes(lambda: [None for _ in [arguments(model, AWAY, 2 * len(passes))]])
    assert abs(task.denoise(in_turn=in_turn) - latents - peak_bytes(step)) <= inputs


def test_more_passes_take_more():
    peaks = [task_of(random_pipeline(), passes).denoise() for passes in (UNGUIDED, GUIDED, (*GUIDED, SKIPS))]
    assert peaks == sorted(peaks) and peaks[0] < peaks[2]
    assert task_of(random_pipeline(), (AWAY,)).denoise() > peaks[0]


def test_weights_stream_once_for_passes_of_the_same_layers():
    task = task_of(random_pipeline(), (*GUIDED, SKIPS), videos=2)
    layers = task.models["transformer"].config.num_layers
    assert layers == 2 and task.model_runs(in_turn=True) == 1.5 and task.model_runs() == 5
    link = Machine(torch.device("cuda"), 1e12, 1e12, flops=1e18, bandwidth=1.0)
    placed = {"transformer": Placement("streamed", resident_blocks=0, source="pinned")}
    seconds = [_step_seconds(task, link, placed, turns) for turns in (True, False)]
    assert seconds == [passed * task.bytes_of("transformer") for passed in (1.5, 5)]
    assert not task_of(random_pipeline(), (PLAIN, SKIPS)).takes_turns
    assert task_of(random_pipeline(), (PLAIN, SKIPS), videos=2).takes_turns


def test_which_plan_has_room_for_which_passes():
    assert most_of([UNGUIDED, (*GUIDED, SKIPS), GUIDED]) == (*GUIDED, SKIPS)
    assert most_of([(), UNGUIDED, (AWAY,)]) == (AWAY,) and most_of([()]) == most_of([]) == UNGUIDED
    assert covers(GUIDED, UNGUIDED) and covers((*GUIDED, SKIPS), GUIDED) and covers((AWAY,), UNGUIDED)
    assert not covers(GUIDED, (*GUIDED, SKIPS)) and not covers(GUIDED, (AWAY,))


# ---- calls ----


def test_a_call_is_planned_for_by_its_guidance():
    pipe = random_pipeline()
    pipe.fit(device="cpu", **SIZE, guided=False)
    assert pipe.memory_plan.passes == UNGUIDED
    latents_of(pipe)
    assert pipe.memory_plan.passes == GUIDED
    first = pipe.memory_plan
    latents_of(pipe, guidance_scale=1.0, guidance_scale_2=None)
    latents_of(pipe, guidance=Gated(after=0.5))
    assert pipe.memory_plan is first, "what was planned for has room for less"
    latents_of(pipe, guidance=SkipLayer(layers=1, start=0, stop=1))
    assert pipe.memory_plan.passes == (*GUIDED, SKIPS)
    latents_of(pipe, guidance=NAG(), guidance_scale=1.0, guidance_scale_2=None)
    assert pipe.memory_plan.passes == (AWAY,)
    pipe.release()


def test_a_plan_that_was_applied_warns(caplog):
    pipe = random_pipeline()
    pipe.apply(plan_in(pipe, 1e9, device="cpu", vram=None))
    latents_of(pipe)
    assert "this takes more memory" not in caplog.text
    latents_of(pipe, guidance=SkipLayer(layers=1, start=0, stop=1))
    assert "this takes more memory" in caplog.text
    pipe.release()


@pytest.mark.parametrize("form", [random_pipeline, random_i2v_pipeline])
def test_what_would_fit_when_memory_runs_out_has_the_passes(form, monkeypatch):
    pipe, sizes = form(), []
    image = {"image": torch.rand(3, 32, 32)} if form is random_i2v_pipeline else {}
    monkeypatch.setattr(phases, "_what_fits", lambda pipe, size: sizes.append(size) or "nothing")

    def full(*arguments, **others):
        raise torch.OutOfMemoryError("full")

    handle = pipe.transformer.blocks[0].register_forward_pre_hook(full)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="memory ran out while denoising"):
            pipe(
                prompt="a",
                **SMALL,
                **image,
                seed=1,
                output_type="latent",
                guidance=SkipLayer(layers=1, start=0, stop=1),
            )
    finally:
        handle.remove()
    assert [size["passes"] for size in sizes] == [(*GUIDED, SKIPS)]


def test_previews_count_them():
    model = ["plan", "Wan2.2-T2V-A14B", "--memory", 80, "--json"]
    plain, skipping, away = (
        json.loads(run(*model, *given)[0])
        for given in ([], ["--guidance", "slg"], ["--guidance", "nag", "-g", 1])
    )
    layers = 40
    assert skipping["flop_per_step"] == pytest.approx(plain["flop_per_step"] * (3 - 1 / layers) / 2)
    assert 0.5 < away["flop_per_step"] / plain["flop_per_step"] < 0.51
    settings = skipping["settings"]
    assert settings["passes"] == 80 + 8 and settings["step_work"] == pytest.approx(3 - 1 / layers)
    assert settings["work"] == pytest.approx(80 + 8 * (1 - 1 / layers))
