"""Videos are made again from their recipes, to the bit, and never from other weights than theirs."""

import gc
import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.builders import SMALL, load_pipeline, random_i2v_pipeline, random_pipeline
from tests.checkpoints.lora_writers import DIALECTS, make_lora, save_one_layer
from wan22 import (
    FlowMatchDPMSolverScheduler,
    FlowMatchEulerScheduler,
    WanI2VPipeline,
    WanT2VPipeline,
    WanTransformer3DModel,
    read_recipe,
    tiny_checkpoint,
)
from wan22.checkpoints.files.fingerprint import fingerprint
from wan22.host_memory import FileMappings
from wan22.video.recipe import Recipe

QUICK = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def tiny():
    return WanT2VPipeline.from_pretrained(tiny_checkpoint())


@pytest.fixture
def pipe(tiny):
    """The embedded checkpoint, quick to call."""
    yield tiny
    tiny.unload_lora_weights()


def made_again(pipe, video, tmp_path, **changes):
    (path, *_) = video.save(tmp_path / "clip.mp4", overwrite=True)
    return pipe.reproduce(path, **changes).frames


# ---- again, to the bit ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_inference_steps": 2, "flow_shift": 7.5, "guidance_scale": 2.5},
        {"guidance_scale": 1, "negative_prompt": "blue"},
        {"sigmas": [1.0, 0.6, 0.2], "num_inference_steps": None},
        {"timesteps": torch.tensor([999.0, 500.0]), "num_inference_steps": None},
        {"distilled": "lightning-4", "num_inference_steps": None},
        {"max_sequence_length": 3, "negative_prompt": "a blue square", "attention_kwargs": {"scale": 0.5}},
    ],
)
def test_every_setting(settings, pipe, tmp_path):
    video = pipe("a red circle — “moving”", seed=3, **{**QUICK, **settings})
    other = pipe("a red circle", seed=4, **QUICK)
    assert not np.array_equal(video.frames, other.frames)
    assert np.array_equal(made_again(pipe, video, tmp_path), video.frames)


def test_one_of_several(pipe, tmp_path):
    videos = pipe(["a", "b"], ["c", ""], seed=[5, 9], num_videos_per_prompt=1, **QUICK)
    videos.save(tmp_path / "clip.mp4")
    again = pipe.reproduce(tmp_path / "clip-2.mp4")
    assert again.recipe.prompts == ("b",) and again.recipe.seeds == (9,)
    assert np.array_equal(again.frames[0], videos.frames[1])
    assert np.array_equal(pipe.reproduce(videos.recipe).frames, videos.frames)


def test_a_random_seed_and_a_generator(pipe, tmp_path):
    video = pipe("a", **QUICK)
    assert np.array_equal(made_again(pipe, video, tmp_path), video.frames)
    video = pipe("a", generator=torch.Generator().manual_seed(11), **QUICK)
    assert np.array_equal(made_again(pipe, video, tmp_path), video.frames)


@pytest.mark.parametrize("cls", [FlowMatchEulerScheduler, FlowMatchDPMSolverScheduler])
def test_another_scheduler_is_brought(cls, pipe, tmp_path):
    mine = pipe.scheduler
    try:
        pipe.scheduler = cls(shift=6.0)
        video = pipe("a", seed=1, **QUICK)
    finally:
        pipe.scheduler = mine
    assert not np.array_equal(pipe("a", seed=1, **QUICK).frames, video.frames)
    assert np.array_equal(made_again(pipe, video, tmp_path), video.frames)
    assert pipe.scheduler is mine


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0, use_karras_sigmas=True),
        diffusers.FlowMatchLCMScheduler(shift=6.0),
        diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=4.0,
            solver_order=3,
            disable_corrector=[0],
            trained_betas=np.array([0.1, 0.2]),
        ),
        diffusers.DPMSolverMultistepScheduler.from_config(
            FlowMatchEulerScheduler(shift=2.0).config, algorithm_type="sde-dpmsolver++", flow_shift=3.0
        ),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_of_diffusers_is_brought(scheduler, pipe, tmp_path, caplog):
    mine = pipe.scheduler
    try:
        pipe.scheduler = scheduler
        video = pipe("a", seed=1, **QUICK)
    finally:
        pipe.scheduler = mine
    assert np.array_equal(made_again(pipe, video, tmp_path), video.frames)
    assert Recipe.from_json(video.recipe.to_json()) == video.recipe
    assert "not expected" not in caplog.text


def test_with_changes(pipe, tmp_path):
    video = pipe("a", seed=1, **QUICK)
    again = made_again(pipe, video, tmp_path, seed=2)
    assert np.array_equal(again, pipe("a", seed=2, **QUICK).frames)


@pytest.mark.parametrize("fit", [None, "pad"])
def test_from_an_image_file(fit, tmp_path):
    pipe = WanI2VPipeline.from_pretrained(tiny_checkpoint("i2v"))
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((70, 50))
    picture.save(tmp_path / "a.png")
    few = {"num_frames": 5, "num_inference_steps": 2, "fit": fit, "max_area": 48 * 48, "seed": 1}
    video = pipe(tmp_path / "a.png", "b", **few)
    assert np.array_equal(pipe.reproduce(video.recipe).frames, video.frames), "the caller gave the file"
    with pytest.raises(ValueError, match=r"names image .*a\.png, which is not opened unasked; give image="):
        made_again(pipe, video, tmp_path)
    assert np.array_equal(made_again(pipe, video, tmp_path, image=tmp_path / "a.png"), video.frames)
    from_memory = pipe(picture, "b", **few)
    assert np.array_equal(from_memory.frames, video.frames)
    with pytest.raises(ValueError, match=r"the recipe's image was in memory; give image="):
        pipe.reproduce(from_memory.recipe)
    assert np.array_equal(pipe.reproduce(from_memory.recipe, image=picture).frames, video.frames)
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        pipe.reproduce(video.recipe)


def test_with_loras(pipe, tmp_path):
    file = save_one_layer(pipe, tmp_path / "lora.safetensors")
    pipe.load_lora_weights(file, strength=(0.3, 0.2), adapter_name="mine")
    video = pipe("a", seed=1, **QUICK)
    (used,) = video.recipe.loras
    assert used.source == str(file)
    assert used.strengths == {"transformer": 0.3, "transformer_2": 0.2}
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match=r"has LoRAs: .*lora\.safetensors.*loaded are: none"):
        pipe.reproduce(video.recipe)
    moved = shutil.copy(file, tmp_path / "moved.safetensors")
    pipe.load_lora_weights(moved, strength=(0.3, 0.2))
    assert np.array_equal(pipe.reproduce(video.recipe).frames, video.frames)
    pipe.set_adapters("default_0", 0.3)
    with pytest.raises(ValueError, match="has LoRAs"):
        pipe.reproduce(video.recipe)
    pipe.unload_lora_weights()
    other = save_one_layer(pipe, tmp_path / "other.safetensors", seed=1)
    pipe.load_lora_weights(other, strength=(0.3, 0.2))
    with pytest.raises(ValueError, match="has LoRAs"):
        pipe.reproduce(video.recipe)


# ---- what is refused ----


def test_what_cannot_be_made_again(pipe):
    embeds, _ = pipe.encode_prompt("a")
    drawn = torch.Generator().manual_seed(1)
    torch.randn(3, generator=drawn)
    few = {**QUICK, "num_inference_steps": 1, "output_type": "latent"}
    latents = pipe("a", seed=1, **few).frames
    for arguments, why in (
        ({"prompt_embeds": embeds}, "prompt_embeds were given"),
        ({"prompt": "a", "latents": latents}, "latents were given"),
        ({"prompt": "a", "negative_prompt_embeds": embeds}, "negative_prompt_embeds were given"),
        ({"prompt": "a", "generator": drawn}, "drawn from before"),
        ({"prompt": "a", "callback_on_step_end": lambda *_: None}, "callback_on_step_end took part"),
        ({"prompt": ["a", "b"], "generator": torch.Generator()}, "one generator"),
    ):
        recipe = pipe(**arguments, **few).recipe
        with pytest.raises(ValueError, match=f"cannot be made again from its recipe: .*{why}"):
            pipe.reproduce(recipe)


def test_other_weights_are_refused(pipe, tmp_path):
    video = pipe("a", seed=1, **QUICK)
    tuned = shutil.copytree(tiny_checkpoint(), tmp_path / "tuned")
    file = tuned / "transformer_2" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = "blocks.1.ffn.net.2.weight"
    weights[name] = weights[name] + 1
    save_file(weights, file, {"format": "pt"})
    other = WanT2VPipeline.from_pretrained(tuned)
    with pytest.raises(ValueError, match=r"transformer_2/diffusion_pytorch_model\.safetensors is another"):
        other.reproduce(video.recipe)
    same = WanT2VPipeline.from_pretrained(shutil.copytree(tiny_checkpoint(), tmp_path / "copy"))
    assert np.array_equal(same.reproduce(video.recipe).frames, video.frames)


def test_files_that_change_after_loading_are_not_those_of_the_video(tmp_path):
    """The weights in memory are the former ones, and the recipe has their fingerprints."""
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "checkpoint")
    pipe = WanT2VPipeline.from_pretrained(folder)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: weight * 1.5 for name, weight in load_file(file).items()}, tmp_path / "new")
    loaded = pipe.provenance.origin()
    os.replace(tmp_path / "new", file)
    assert (
        pipe.provenance.origin() == loaded
        and "transformer/diffusion_pytorch_model.safetensors" in loaded.files
    )
    video = pipe("a", seed=1, **QUICK)
    with pytest.raises(ValueError, match=r"transformer/diffusion_pytorch_model\.safetensors is another"):
        WanT2VPipeline.from_pretrained(folder).reproduce(video.recipe)
    shutil.rmtree(folder)
    assert np.array_equal(pipe("a", seed=1, **QUICK).frames, video.frames)
    assert pipe.provenance.origin() == loaded


def test_a_model_put_in_later_is_not_taken_for_the_files(tmp_path):
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint())
    assert pipe.provenance.origin().replaced == ()
    pipe.transformer = WanTransformer3DModel.from_pretrained(tiny_checkpoint(), subfolder="transformer")
    assert pipe.provenance.origin().replaced == ("transformer",)
    assert not any(name.startswith("transformer/") for name in pipe.provenance.origin().files)
    given = WanT2VPipeline.from_pretrained(tiny_checkpoint(), transformer=pipe.transformer)
    assert given.provenance.origin() == pipe.provenance.origin()


def test_another_dtype_task_or_change_is_refused(pipe):
    recipe = pipe("a", seed=1, **QUICK).recipe
    wide = WanT2VPipeline.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"made with dtypes \{.*bfloat16.*this pipeline has \{.*float32"):
        wide.reproduce(recipe)
    with pytest.raises(ValueError, match="one of WanT2VPipeline, this is a WanI2VPipeline"):
        random_i2v_pipeline().reproduce(recipe)
    with pytest.raises(ValueError, match="the recipe is of tiny-t2v, this is"):
        random_pipeline().reproduce(recipe)
    pipe.vae.enable_tiling()
    try:
        with pytest.raises(
            ValueError, match=r"changes \{\}; this pipeline has \{'tiled': \{'min_height': 256"
        ):
            pipe.reproduce(recipe)
    finally:
        pipe.vae.disable_tiling()


# ---- recipes that anybody may have written ----


def changed(recipe, call=(), **entries):
    """Return a recipe as it is read from a file in which somebody has changed entries."""
    values = json.loads(recipe.to_json())
    values |= {**entries, "call": values["call"] | dict(call)}
    return Recipe.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("call", "entries", "message"),
    [
        ({"preview": "/tmp/x.png"}, {}, "'preview' is no argument that this pipeline takes"),
        ({"output_type": "latent"}, {}, "'output_type' is no argument"),
        ({"image": ["/etc/passwd"]}, {}, "'image' is no argument"),
        ({"self": 1}, {}, "'self' is no argument"),
        ({"num_inference_steps": 10**9}, {}, "asks for 1000000000 num_inference_steps, more than 10000"),
        ({"num_frames": 4 * 10**9 + 1}, {}, "pixels, more than 100000000000; give num_frames="),
        ({"height": 16 * 10**8, "width": 16 * 10**8}, {}, "pixels, more than 100000000000"),
        ({"prompt": ["a"] * 10**5, "seed": [1] * 10**5}, {}, "asks for 100000 videos, more than 1000"),
        ({"sigmas": [1.0] * 10**5}, {}, "asks for 100000 sigmas, more than 10000"),
        ({}, {"scheduler": "importlib"}, "scheduler is 'importlib'; set pipe.scheduler"),
        ({}, {"scheduler": "FlowMatchScheduler"}, "scheduler is 'FlowMatchScheduler'; set"),
        ({}, {"scheduler": "DiffusionPipeline"}, "scheduler is 'DiffusionPipeline'; set"),
        (
            {},
            {"scheduler": "DDIMScheduler", "scheduler_config": {"beta_schedule": [1]}},
            "'DDIMScheduler' cannot be built",
        ),
        ({}, {"scheduler_config": {"num_train_timesteps": 10**12}}, "num_train_timesteps, more than 10000"),
    ],
)
def test_what_a_recipe_may_not_bring_about(call, entries, message, pipe):
    recipe = changed(pipe("a", seed=1, **{**QUICK, "num_inference_steps": 1}).recipe, call, **entries)
    with pytest.raises(ValueError, match=message) as caught:
        pipe.reproduce(recipe)
    assert type(caught.value) is ValueError


def test_what_a_recipe_asks_too_much_of_may_be_given(pipe):
    recipe = changed(pipe("a", seed=1, **QUICK).recipe, {"num_inference_steps": 10**9})
    assert pipe.reproduce(recipe, num_inference_steps=1).recipe.num_inference_steps == 1


def test_a_scale_of_more_than_64_bits_is_a_number(pipe):
    """Recipes and callers may give it; torch takes no such int."""
    few = {**QUICK, "num_inference_steps": 1, "output_type": "latent"}
    video = pipe("a", seed=1, guidance_scale=10**30, **few)
    assert torch.isfinite(video.frames).all() and video.recipe.guidance_scale == 1e30
    assert torch.equal(pipe.reproduce(changed(video.recipe), output_type="latent").frames, video.frames)


def test_another_machine_is_told(pipe, caplog):
    recipe = pipe("a", seed=1, **QUICK).recipe
    other = Recipe.from_json(json.dumps({**json.loads(recipe.to_json()), "device": "abacus"}))
    pipe.reproduce(other)
    assert "['device'] differ from the recipe's" in caplog.text


# ---- recipes ----


def test_recipes_are_the_same_after_reading(pipe, tmp_path):
    recipe = pipe(["a", "b"], seed=2, **QUICK).recipe
    assert Recipe.from_json(recipe.to_json()) == Recipe.from_json(
        Recipe.from_json(recipe.to_json()).to_json()
    )
    assert recipe.to_json().isascii() and "\n" not in recipe.to_json()
    newer = {**json.loads(recipe.to_json()), "wan22_recipe": 99, "a_new_setting": 1}
    assert Recipe.from_json(json.dumps(newer)).prompts == ("a", "b")
    for text in ("", "[]", "{}", '{"wan22_recipe": 1}', "null"):
        with pytest.raises(ValueError, match="no recipe of wan22"):
            Recipe.from_json(text)


OLD_CALLS = {
    "two": {"prompt": ["a", "a", "b", "b"], "negative_prompt": ["c", "c", "", ""], "num_inference_steps": 2},
    "sigmas": {"prompt": "a", "sigmas": [1.0, 0.5], "guidance_scale": 1},
    "lightning": {"prompt": "a", "distilled": "lightning-4"},
}


@pytest.mark.parametrize("name", OLD_CALLS)
def test_recipes_of_the_first_format(name, pipe):
    """Files of earlier versions hold the settings of each video, not the call."""
    old = json.loads((Path(__file__).parents[2] / "video" / "recipes_format_1.json").read_text())[name]
    size = {"height": 32, "width": 32, "num_frames": 5}
    expected = pipe(**OLD_CALLS[name], **size, seed=3).frames
    recipe = Recipe.from_json(json.dumps(old))
    assert recipe.prompts == tuple(old["prompts"]) and recipe.seeds == tuple(old["seeds"])
    assert np.array_equal(pipe.reproduce(recipe).frames, expected)
    stopped = Recipe.from_json(json.dumps({**old, "obstacle": "latents were given"}))
    with pytest.raises(ValueError, match="latents were given"):
        pipe.reproduce(stopped)


def test_an_image_of_the_first_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = json.loads((Path(__file__).parents[2] / "video" / "recipes_format_1.json").read_text())["image"]
    pipe = WanI2VPipeline.from_pretrained(tiny_checkpoint("i2v"))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((70, 50)).save("a.png")
    few = {"num_frames": 5, "num_inference_steps": 2, "max_area": 48 * 48, "seed": 1}
    expected = pipe("a.png", "b", **few).frames
    assert np.array_equal(pipe.reproduce(Recipe.from_json(json.dumps(old)), image="a.png").frames, expected)


def test_fingerprints(tmp_path):
    weights = {"a": torch.zeros(300_000), "b": torch.ones(5)}
    save_file(weights, tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    save_file({**weights, "a": weights["a"] + 1}, tmp_path / "c.safetensors")
    save_file({"x": weights["a"], "b": weights["b"]}, tmp_path / "d.safetensors")
    a, b, c, d = (fingerprint(tmp_path / f"{name}.safetensors") for name in "abcd")
    assert a == b and len({a, c, d}) == 3


def test_a_snapshot_tells_its_revision(tmp_path):
    folder = tmp_path / "models--x--y" / "snapshots" / "0123abc"
    shutil.copytree(tiny_checkpoint(), folder)
    assert WanT2VPipeline.from_pretrained(folder).provenance.origin().revision == "0123abc"


def test_single_files_have_an_origin(tmp_path):
    folder = tiny_checkpoint()
    files = {name: folder / name / "diffusion_pytorch_model.safetensors" for name in ("transformer", "vae")}
    pipe = WanT2VPipeline.from_single_file(
        files["transformer"], vae=files["vae"], attention_head_dim=64, boundary_ratio=None
    )
    assert set(pipe.provenance.origin().files) == {f"{name}/{path.name}" for name, path in files.items()}


def test_the_miniatures_are_told_by_their_names():
    """Their folder is another one on every machine, and nothing of it goes into a file."""
    for name, cls in (("t2v", WanT2VPipeline), ("i2v", WanI2VPipeline)):
        pipe = cls.from_pretrained(tiny_checkpoint(name))
        assert pipe.provenance.origin().place == f"tiny-{name}"
        assert len(pipe.provenance.origin().files) == 4


def test_from_pipe_keeps_the_origin():
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint())
    assert WanT2VPipeline.from_pipe(pipe).provenance.origin() == pipe.provenance.origin()


def test_files_are_those_that_were_loaded(saved_bf16, tmp_path):
    """Replaced since, they are not taken for them; deleted, they are not missed."""
    folder = shutil.copytree(saved_bf16, tmp_path / "here")
    pipe = load_pipeline(folder)
    lora, other_lora = tmp_path / "lora.safetensors", tmp_path / "other.safetensors"
    for seed, path in enumerate((lora, other_lora)):
        save_file(DIALECTS["diffusers"](make_lora(pipe.transformer, seed)), path)
    pipe.load_lora_weights(lora)
    before = pipe("a", seed=1, **QUICK)
    other_lora.replace(lora)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    other = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    other.replace(weights)
    replaced = pipe("a", seed=1, **QUICK)
    shutil.rmtree(folder)
    lora.unlink()
    deleted = pipe("a", seed=1, **QUICK)
    for after in (replaced, deleted):
        assert after.recipe == before.recipe
        assert np.array_equal(after.frames, before.frames)
    assert np.array_equal(pipe.reproduce(before.recipe).frames, before.frames)


def test_a_file_that_is_cut_off_under_mapped_weights_is_told(saved_bf16, tmp_path):
    folder = shutil.copytree(saved_bf16, tmp_path / "here")
    pipe = load_pipeline(folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    files = FileMappings()
    if not any(weight in files for weight in pipe.transformer.parameters()):
        pytest.skip("the weights are not mapped here")
    os.truncate(weights, 100)
    with pytest.raises(
        OSError, match=r"transformer/diffusion_pytorch_model\.safetensors was cut off"
    ) as error:
        pipe("a", seed=1, **QUICK)
    assert "\n" not in str(error.value)
    pipe.transformer = None  # nothing reads it any more
    gc.collect()
    pipe("a", seed=1, **{**QUICK, "timesteps": [500.0], "num_inference_steps": None, "flow_shift": None})


# ---- streams, stopping ----


def test_a_stream_has_the_frames_of_a_call(pipe, tmp_path):
    video = pipe("a", seed=1, **QUICK)
    stream = pipe.stream("a", seed=1, **QUICK)
    assert stream.recipe == video.recipe
    frames = list(stream)
    assert all(frame.dtype == np.uint8 for frame in frames)
    assert np.array_equal(np.stack(frames), video.as_uint8()[0])
    pipe.stream("a", seed=1, **QUICK).save(tmp_path / "a.mp4")
    video.save(tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert read_recipe(tmp_path / "a.mp4") == video.recipe
    with pytest.raises(ValueError, match="2 videos cannot be streamed together"):
        pipe.stream(["a", "b"], **QUICK)


def test_a_stream_decodes_as_it_is_asked(pipe):
    decoded = []
    handle = pipe.vae.decoder.register_forward_hook(lambda *_: decoded.append(1))
    try:
        stream = iter(pipe.stream("a", seed=1, **{**QUICK, "num_frames": 17}))
        assert not decoded
        next(stream)
        assert len(decoded) == 1
        assert torch.is_grad_enabled(), "the caller's own work is not affected"
    finally:
        handle.remove()


def test_stopping_gives_the_video_as_it_would_become(pipe):
    seen = []

    def look(preview):
        seen.append(preview.step)
        if preview.step == 2:
            pipe.stop()

    few = {**SMALL, "num_inference_steps": 4, "seed": 1}
    video = pipe("a", **few, preview=look, preview_every=1)
    assert seen == [1, 2]
    assert video.recipe.steps_done == 2
    assert np.isfinite(video.frames).all()
    with pytest.raises(ValueError, match="stopped after step 2"):
        pipe.reproduce(video.recipe)
    whole = pipe("a", **few)
    assert whole.recipe.steps_done is None, "the next call runs to its end"
    noisy = pipe("a", **few, callback_on_step_end=lambda p, i, t, x: setattr(p, "_interrupt", i == 1))

    def off(other):
        return np.abs(other.frames - whole.frames).mean()

    assert off(video) < off(noisy), "what the model predicts, not what is still noise"


def test_a_stop_while_the_prompt_is_encoded_counts(pipe, monkeypatch):
    encode = pipe.encode
    monkeypatch.setattr(pipe, "encode", lambda call: (pipe.stop(), encode(call))[1])
    video = pipe("a", **{**SMALL, "num_inference_steps": 4, "seed": 1})
    assert video.recipe.steps_done == 1


def test_previews_leave_the_video_as_it_is(pipe, tmp_path):
    seen = []
    plain = pipe("a", seed=1, **QUICK)
    shown = pipe("a", seed=1, **QUICK, preview=seen.append, preview_every=2)
    assert [preview.step for preview in seen] == [2, 3]
    assert np.array_equal(shown.frames, plain.frames)
    pipe("a", seed=1, **QUICK, preview=tmp_path / "now.png")
    assert Image.open(tmp_path / "now.png").size[0] >= 256
    with pytest.raises(ValueError, match="preview_every=2 needs preview"):
        pipe("a", **QUICK, preview_every=2)
    with pytest.raises(ValueError, match=r"now\.bmp"):
        pipe("a", **QUICK, preview=tmp_path / "now.bmp")


# ---- progress ----


def test_the_bar_tells_the_phase_and_the_expert(pipe, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_NCOLS", "500")
    pipe.set_progress_bar_config(disable=False)
    try:
        pipe("a", seed=1, **QUICK)
        told = capsys.readouterr().err
        assert "sampling" in told and "3/3" in told and "high noise" in told
        assert "decoding" in told and "5/5" in told
        pipe("a", seed=1, **QUICK, preview=tmp_path / "now.gif")
        assert f"high noise, {tmp_path / 'now.gif'}" in capsys.readouterr().err, "where to look"
        pipe.set_progress_bar_config(disable=True)
        pipe("a", seed=1, **QUICK)
        assert capsys.readouterr().err == ""
    finally:
        pipe.set_progress_bar_config()


def test_nothing_is_drawn_where_nobody_looks(pipe, capsys, tmp_path):
    pipe("a", seed=1, **QUICK).save(tmp_path / "a.mp4")
    assert capsys.readouterr().err == "", "the output is no terminal"
