"""A plan on a pipeline: when it is made anew, what it refuses, what is left of it."""

import gc
import weakref
from dataclasses import replace

import diffusers
import pytest
import torch

from tests.accel.offload.recording import RecordingDevice
from tests.accel.planning.test_planner import SIZE, SLOTS, own_pipeline, plan_in
from tests.builders import latents_of, random_i2v_pipeline, random_pipeline
from tests.golden_data import relative_error
from tests.pipelines.attached.test_acceleration import out_of_memory_below
from wan22 import WanT2VPipeline, accel, presets
from wan22.accel import vae
from wan22.accel.offload.layout import Placement, bytes_of
from wan22.accel.planning.meta_models import released_models
from wan22.checkpoints.lora.adapters import adapters_of


@pytest.fixture
def fitted(monkeypatch):
    """A pipeline in a budget, on a device that records."""
    monkeypatch.setattr("wan22.pipelines.attached.memory.CudaDevice", lambda *_: RecordingDevice())
    pipe = own_pipeline()
    pipe.fit("2GB", "8GB", **SIZE)
    return pipe


# ---- made anew ----


def test_a_video_that_does_not_fit_leaves_the_plan(fitted):
    plan, plain = fitted.memory_plan, latents_of(own_pipeline())
    with pytest.raises(ValueError, match="does not fit into"):
        latents_of(fitted, height=2048, width=2048, num_frames=81)
    assert fitted.memory_plan is plan
    assert torch.equal(latents_of(fitted), plain)
    assert fitted.memory_plan is plan


def test_larger_frames_are_planned_anew(fitted):
    """Though there are fewer pixels in all."""
    latents_of(fitted, height=48, width=48, num_frames=1)
    assert fitted.memory_plan.size == (48, 48, 1)


def test_more_videos_are_planned_anew(fitted):
    latents_of(fitted, ["a", "b"], num_videos_per_prompt=2)
    plan = fitted.memory_plan
    assert plan.videos == 4
    assert "5 frames, 4 videos, on" in str(plan)
    latents_of(fitted, "a")
    assert fitted.memory_plan is plan


def test_a_plan_for_less_says_so(caplog):
    pipe = own_pipeline()
    pipe.apply(plan_in(pipe, 1e9), RecordingDevice())
    latents_of(pipe, ["a", "b"])
    assert "the plan is for 32x32, 5 frames, 1 of such videos; this takes more memory" in caplog.text


# ---- beside other things ----


def test_a_step_cache_begins_anew_with_each_video():
    """Of the second video, steps would be taken from the first."""
    pipe = own_pipeline()
    for model in pipe.transformers:
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    expected = [latents_of(pipe, prompt) for prompt in ("a", "something else")]
    pipe.apply(plan_in(pipe, 1e9), RecordingDevice())
    for prompt, latents in zip(("a", "something else"), expected, strict=True):
        assert torch.equal(latents_of(pipe, prompt), latents)


def test_accelerated_while_models_are_on_the_device():
    pipe, device = own_pipeline(), RecordingDevice()
    plain = latents_of(pipe, output_type="pt")
    pipe.apply(plan_in(pipe, 1e9), device)
    for change, bound in ((pipe.accelerate, 1e-4), (pipe.decelerate, 0)):
        latents_of(pipe, output_type="pt")
        change()
        assert not device.resident
        assert relative_error(latents_of(pipe, output_type="pt"), plain) <= bound


def test_weights_are_laid_out_for_where_they_are_used(monkeypatch):
    """Those of a plan, for the device: not where they are at home."""
    monkeypatch.setattr(vae, "_faster_contiguous", lambda weight, device: device.type == "cpu")
    pipe, device = own_pipeline(), RecordingDevice()
    pipe.accelerate()
    assert pipe.vae.decoder.conv_in.weight.is_contiguous()
    device.torch_device = torch.device("meta")  # one that is not the CPU
    pipe.apply(plan_in(pipe, 1e9), device)
    pipe.accelerate()
    assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_hooks_that_diffusers_took_away(fitted):
    plain = latents_of(own_pipeline())
    fitted.remove_all_hooks()
    assert torch.equal(latents_of(fitted), plain)
    assert torch.equal(
        latents_of(fitted, height=64, width=64), latents_of(own_pipeline(), height=64, width=64)
    )
    assert fitted.memory._offloader.on_device == ()  # no plan was made anew
    assert fitted.memory_plan.size == (32, 32, 5)
    fitted.release()
    assert fitted.memory_plan is None


def test_to_while_a_plan_moves_the_models(fitted):
    latents_of(fitted)
    for arguments, options in ((("cuda",), {}), (("cpu", torch.float64), {}), ((), {"device": "cpu"})):
        with pytest.raises(ValueError, match=r"the plan moves the models; call pipe\.release\(\) first"):
            fitted.to(*arguments, **options)
    assert fitted.to(torch.float64) is fitted
    assert fitted.transformer.dtype == torch.float64
    assert torch.equal(latents_of(fitted), latents_of(own_pipeline().to(torch.float64)))
    fitted.release()
    assert fitted.to("cpu") is fitted


@pytest.mark.parametrize("source", ["mmap", "pinned"])
def test_quantised_weights_take_the_place_of_the_others(source):
    pipe = own_pipeline()
    plan = plan_in(pipe, 1e9)
    placements = plan.placements | dict.fromkeys(SLOTS, Placement("on_demand", source=source))
    pipe.apply(replace(plan, placements=placements), RecordingDevice())
    latents_of(pipe)
    old = [weakref.ref(block.ffn.net[2].weight) for block in pipe.transformer.blocks]
    pipe.quantize("int8")
    gc.collect()
    assert [weight() for weight in old] == [None] * len(old)


# ---- refused ----


def strips_of(pipe):
    return pipe.vae.num_strips if pipe.vae.use_strips else None


def test_a_plan_that_is_refused_changes_nothing(tmp_path):
    from tests.checkpoints.lora_writers import make_lora, save

    pipe = own_pipeline()
    plain = latents_of(pipe)
    plan = replace(plan_in(pipe, 1e9, quantize="int8"), strips=2)
    without = {name: p for name, p in plan.placements.items() if name != "vae"}
    with pytest.raises(ValueError, match="does not say where to keep vae; make one for this pipeline"):
        pipe.apply(replace(plan, placements=without), RecordingDevice())
    too_many = plan.placements | {"transformer_2": Placement("streamed", resident_blocks=99)}
    with pytest.raises(ValueError, match="resident_blocks=99, but transformer_2 has 2 blocks"):
        pipe.apply(replace(plan, placements=too_many), RecordingDevice())
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no CUDA device here"):
            pipe.apply(plan)
    pipe.vae.enable_tiling()
    with pytest.raises(ValueError, match=r"2 strips, and tiling is enabled; call pipe\.vae\.disable_tiling"):
        pipe.apply(plan, RecordingDevice())
    pipe.vae.disable_tiling()
    assert strips_of(pipe) is None
    assert torch.equal(latents_of(pipe), plain)
    lora = save(make_lora(pipe.transformer_2, 1), tmp_path / "a.safetensors")
    pipe.load_lora_weights(low=lora)
    changed = latents_of(pipe)
    with pytest.raises(ValueError, match="has LoRAs"):
        pipe.apply(plan, RecordingDevice())
    assert strips_of(pipe) is None
    assert torch.equal(latents_of(pipe), changed)  # the first transformer is as it was, too


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpus_memory_without_a_gpu(tmp_path):
    random_pipeline().save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(
        ValueError, match="'12GB' is a GPU's, and there is no CUDA device here; memory='auto' plans"
    ):
        WanT2VPipeline.from_pretrained(tmp_path, memory="12GB")


# ---- what is left ----


@pytest.mark.parametrize("before", [None, 3])
def test_decoding_is_as_before_once_a_plan_is_released(before, monkeypatch):
    """Also where memory ran out on the way, and more strips were taken."""
    pipe = own_pipeline()
    plan = plan_in(pipe, 1e9)
    if before:
        pipe.vae.enable_strips(before)
    pipe.apply(plan, RecordingDevice())
    assert strips_of(pipe) is None
    out_of_memory_below(pipe.vae, 2, monkeypatch)
    latents_of(pipe, output_type="pt", num_frames=9)
    assert strips_of(pipe) == 2
    pipe.release()
    assert strips_of(pipe) == before
    pipe.apply(plan, RecordingDevice())
    pipe.vae.disable_strips()
    pipe.vae.enable_tiling()
    pipe.release()  # what was asked for since stays
    assert pipe.vae.use_tiling


def test_nothing_is_left_of_a_pipeline_that_was_freed(tmp_path):
    from tests.checkpoints.lora_writers import make_lora, save

    pipe = own_pipeline()
    lora = save(make_lora(pipe.transformer, 1), tmp_path / "a.safetensors")
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.accelerate()
    pipe.apply(plan_in(pipe, 1e9), RecordingDevice())
    kept = [weakref.ref(weight) for weight in adapters_of(pipe.transformer).fused_weights()]
    latents_of(pipe)
    pipe.free()
    gc.collect()
    assert kept
    assert [weight() for weight in kept] == [None] * len(kept)


def test_wan_21_for_images_has_an_image_encoder():
    """632 million parameters, in bf16."""
    for preset in (presets.I2V_14B, presets.FLF_14B):
        assert bytes_of(released_models(preset)["image_encoder"]) == pytest.approx(1.264e9, rel=0.01)
    assert (
        accel.plan(presets.I2V_14B, vram="24GB", ram="64GB").placements["image_encoder"].kind == "on_demand"
    )
    assert "image_encoder" not in accel.plan(presets.I2V_A14B, vram="24GB", ram="80GB").placements


def test_an_image_encoder_is_planned_before_it_is_loaded(tmp_path):
    from wan22 import WanI2VPipeline
    from wan22.pipelines.loading.checkpoint import Wanted
    from wan22.pipelines.loading.load import locate, outlined_pipeline

    random_i2v_pipeline(experts=1).save_pretrained(tmp_path)
    outline = locate(str(tmp_path), {}).outline(Wanted())
    outlined = outlined_pipeline(WanI2VPipeline, outline, Wanted())
    assert all(p.is_meta for p in outlined.image_encoder.parameters())
    assert "image_encoder" in plan_in(outlined, 1e9).placements
