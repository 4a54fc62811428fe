"""Images become videos: what the transformers are given, sizes, batches, checkpoints, errors."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import wan22
from tests.builders import (
    SMALL,
    load_pipeline,
    random_components,
    random_i2v_pipeline,
    random_pipeline,
    random_ti2v_pipeline,
    recording,
)
from tests.golden_data import relative_error
from wan22 import FlowMatchUniPCScheduler, WanI2VPipeline, WanT2VPipeline
from wan22.pipelines.call.images import load_picture

ONE_SCALE = {k: v for k, v in SMALL.items() if k != "guidance_scale_2"}
BY_AREA = {k: v for k, v in SMALL.items() if k not in ("height", "width")}


def photo(width=32, height=32, seed=0) -> Image.Image:
    """A smooth random picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def latents(pipe, image=None, prompt="a red circle", **arguments):
    two = pipe.config.boundary_ratio is not None
    defaults = {**(SMALL if two else ONE_SCALE), "seed": 7, "output_type": "latent"}
    if "max_area" in arguments:
        defaults = {k: v for k, v in defaults.items() if k in BY_AREA or k in ("seed", "output_type")}
    return pipe(image, prompt, **{**defaults, **arguments}).frames


@pytest.fixture
def i2v():
    return random_i2v_pipeline()


@pytest.fixture
def ti2v():
    return random_ti2v_pipeline()


def seen_by_the_transformers(pipe, *args, **kwargs):
    """Run a call and return its latents and each model call's arguments."""
    seen, handles = [], []
    for model in pipe.transformers:
        handles.append(model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True))
    try:
        return latents(pipe, *args, **kwargs), seen
    finally:
        for handle in handles:
            handle.remove()


# ---- what the transformer gets ----


@pytest.mark.parametrize("last", [False, True])
def test_channels_beside_the_noise(i2v, last):
    first, end = photo(seed=1), photo(seed=2)
    _, seen = seen_by_the_transformers(i2v, first, last_image=end if last else None)
    given = seen[0]["hidden_states"][:, 16:]
    mask = torch.zeros(1, 4, 2, 4, 4)
    mask[:, :, 0] = 1
    clip = torch.zeros(1, 3, 5, 32, 32)
    clip[:, :, 0] = load_picture("image", first).pixels
    if last:
        mask[:, 3, 1] = 1
        clip[:, :, 4] = load_picture("image", end).pixels
    assert torch.equal(given[:, :4], mask)
    reference = i2v.vae.normalize_latents(i2v.vae.encode(clip).latent_dist.mode())
    assert relative_error(given[:, 4:], reference) <= 1e-6
    assert all(torch.equal(call["hidden_states"][:, 16:], given) for call in seen)


def test_first_frame_and_its_time(ti2v):
    image = photo(64, 64)
    result, seen = seen_by_the_transformers(ti2v, image, height=64, width=64)
    pixels = load_picture("image", image).pixels[None, :, None]
    first = ti2v.vae.normalize_latents(ti2v.vae.encode(pixels).latent_dist.mode())
    times = ti2v.scheduler.timesteps
    for i, call in enumerate(seen):
        assert relative_error(call["hidden_states"][:, :, :1], first) <= 1e-6
        expected = torch.tensor([[0.0, float(times[i // 2])]])
        assert torch.equal(call["timestep"].float(), expected)
    assert relative_error(result[:, :, :1], first) <= 1e-6


def test_5b_without_an_image_is_text_to_video(ti2v):
    both = WanT2VPipeline.from_pipe(ti2v)
    arguments = {**ONE_SCALE, "seed": 7, "output_type": "latent"}
    assert torch.equal(ti2v(prompt="a", **arguments).frames, both("a", **arguments).frames)


# ---- the same as diffusers ----


def theirs(ours):
    pipe = diffusers.WanImageToVideoPipeline(
        **{k: v for k, v in ours.components.items() if k != "scheduler"},
        scheduler=FlowMatchUniPCScheduler(shift=5.0),
        boundary_ratio=ours.config.boundary_ratio,
        expand_timesteps=ours.config.expand_timesteps,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("make", "last"),
    [
        (random_i2v_pipeline, False),
        (random_i2v_pipeline, True),
        (lambda: random_i2v_pipeline(1), False),
        (lambda: random_i2v_pipeline(1, two_frames=True), True),
        (random_ti2v_pipeline, False),
    ],
    ids=["a14b", "a14b-last", "2.1", "2.1-flf", "5b"],
)
def test_equal_to_diffusers(make, last):
    ours = make()
    embeds, negative = ours.encode_prompt("a red circle", "fog")
    side = 64 if ours.config.expand_timesteps else 32
    arguments = {
        "image": photo(side, side, 1),
        "last_image": photo(side, side, 2) if last else None,
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "latents": torch.randn(
            1, *ours.latent_shape(5, side, side), generator=torch.Generator().manual_seed(3)
        ),
        "height": side,
        "width": side,
        "num_frames": 5,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    mine = ours(**arguments).frames
    assert relative_error(mine, theirs(ours)(**arguments).frames) <= 1e-5
    other = ours(**arguments | {"image": photo(side, side, 5)}).frames
    assert relative_error(other, mine) > 1e-3


def test_image_rows_by_hand_are_those_of_the_encoder():
    pipe = random_i2v_pipeline(1)
    rows = pipe.encode_image(photo(seed=1))
    without = random_i2v_pipeline(1, image_encoder=None)
    assert torch.equal(latents(pipe, photo(seed=1)), latents(without, photo(seed=1), image_embeds=rows))
    assert torch.equal(latents(pipe, photo(seed=1)), latents(without, photo(seed=1), image_embeds=rows[0]))


# ---- batches ----


@pytest.mark.parametrize("make", [random_i2v_pipeline, random_ti2v_pipeline, lambda: random_i2v_pipeline(1)])
def test_a_video_alone_and_in_a_batch(make):
    pipe = make()
    images, prompts = [photo(seed=1), photo(seed=2)], ["a", "b c"]
    together = latents(pipe, images, prompts, seed=[5, 9])
    for i in range(2):
        assert torch.equal(together[i : i + 1], latents(pipe, images[i], prompts[i], seed=[5, 9][i]))


def test_first_and_last_frames_in_a_batch():
    pipe = random_i2v_pipeline(1, two_frames=True)
    first, last = [photo(seed=1), photo(seed=2)], [photo(seed=3), photo(seed=4)]
    together = latents(pipe, first, ["a", "b"], last_image=last, seed=[5, 9])
    alone = latents(pipe, first[1], "b", last_image=last[1], seed=9)
    assert torch.equal(together[1:], alone)


def test_one_image_for_many_prompts_is_encoded_once(i2v):
    calls = []
    encode = i2v.encode_clip
    i2v.encode_clip = lambda pieces: calls.append(1) or encode(pieces)
    result = latents(i2v, photo(), ["a", "b"], num_videos_per_prompt=2)
    assert len(result) == 4
    assert len(calls) == 1
    assert torch.equal(result[3:], latents(i2v, photo(), "b", seed=10))


def test_many_images_for_one_prompt(i2v):
    result = i2v([photo(seed=1), photo(seed=2)], "a", **SMALL, seed=7, num_videos_per_prompt=2)
    assert result.recipe.prompts == ("a",) * 4
    assert torch.equal(
        torch.from_numpy(result.frames[2]),
        torch.from_numpy(i2v(photo(seed=2), "a", **SMALL, seed=9).frames[0]),
    )


# ---- sizes ----


@pytest.mark.parametrize(
    ("make", "image", "area", "size"),
    [
        (random_i2v_pipeline, (64, 32), 64 * 32, (64, 32)),
        (random_i2v_pipeline, (300, 400), 48 * 64, (48, 64)),
        (random_i2v_pipeline, (100, 70), 64 * 48, (64, 32)),
        (random_ti2v_pipeline, (100, 200), 64 * 32, (32, 64)),
    ],
)
def test_the_image_decides_the_size(make, image, area, size):
    pipe = make()
    scales = {} if pipe.config.boundary_ratio else {"guidance_scale_2": None}
    video = pipe(photo(*image), "a", **BY_AREA | scales, max_area=area, seed=1)
    assert (video.recipe.width, video.recipe.height) == size
    assert video.frames.shape[2:4] == size[::-1]


def test_the_area_is_the_checkpoints(i2v):
    request = i2v.default_size
    picture = load_picture("image", photo(832, 480))
    i2v_request = type("R", (), {"image": [picture], "max_area": None})
    assert request(i2v_request) == (720, 1248)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fit(i2v, fit):
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (32, 0, 64, 32))  # only this third survives a crop to a square
    _, seen = seen_by_the_transformers(i2v, image, fit=fit)
    clip = torch.zeros(1, 3, 5, 32, 32)
    clip[:, :, 0] = {
        "crop": load_picture("image", image.crop((32, 0, 64, 32))).pixels,
        "pad": i2v_padded(image),
        "stretch": torch.nn.functional.interpolate(
            load_picture("image", image).pixels[None], (32, 32), mode="bicubic"
        )[0],
    }[fit]
    reference = i2v.vae.normalize_latents(i2v.vae.encode(clip).latent_dist.mode())
    assert relative_error(seen[0]["hidden_states"][:, 20:], reference) <= 1e-5


def i2v_padded(image):
    small = torch.nn.functional.interpolate(
        load_picture("image", image).pixels[None], (11, 32), mode="bicubic"
    )
    padded = -torch.ones(3, 32, 32)
    padded[:, 10:21] = small[0]
    return padded


def test_the_recipe_tells_of_the_images(i2v, tmp_path):
    path = tmp_path / "a b.png"
    photo().save(path)
    recipe = i2v(path, "a", last_image=photo(), **SMALL, fit="pad").recipe
    assert (recipe.image, recipe.last_image, recipe.fit) == ([str(path)], [None], "pad")


# ---- checkpoints ----


def test_saved_and_loaded(i2v, tmp_path):
    i2v.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours/model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
    plain = diffusers.WanImageToVideoPipeline.from_pretrained(tmp_path / "ours")
    assert type(plain.transformer) is diffusers.WanTransformer3DModel
    plain.save_pretrained(tmp_path / "theirs")
    back = WanI2VPipeline.from_pretrained(tmp_path / "theirs")
    back.set_progress_bar_config(disable=True)
    assert torch.equal(latents(back, photo()), latents(i2v, photo()))


def test_2_1_saved_and_loaded(tmp_path):
    pipe = random_i2v_pipeline(1)
    pipe.save_pretrained(tmp_path)
    back = WanI2VPipeline.from_pretrained(tmp_path)
    back.set_progress_bar_config(disable=True)
    assert torch.equal(latents(back, photo()), latents(pipe, photo()))


@pytest.mark.parametrize("saved_as", [WanT2VPipeline, WanI2VPipeline])
def test_5b_loads_into_both(saved_as, ti2v, tmp_path, caplog):
    saved_as.from_pipe(ti2v).save_pretrained(tmp_path)
    image = WanI2VPipeline.from_pretrained(tmp_path)
    image.set_progress_bar_config(disable=True)
    assert torch.equal(latents(image, photo()), latents(ti2v, photo()))
    text = load_pipeline(tmp_path)
    assert type(text) is WanT2VPipeline
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    diffusers.WanImageToVideoPipeline.from_pretrained(tmp_path)


def test_from_pipe_shares_weights(ti2v):
    text = WanT2VPipeline.from_pipe(ti2v)
    assert text.transformer is ti2v.transformer
    assert WanI2VPipeline.from_pipe(text).vae is ti2v.vae
    pipe = random_i2v_pipeline()
    assert WanI2VPipeline.from_pipe(theirs(pipe)).transformer is pipe.transformer


def test_the_other_class_is_named(i2v, tmp_path):
    with pytest.raises(ValueError, match=r"36 channels for 16.*use WanI2VPipeline"):
        WanT2VPipeline.from_pipe(i2v)
    with pytest.raises(ValueError, match=r"16 channels.*text-to-video checkpoint; use WanT2VPipeline"):
        WanI2VPipeline.from_pipe(random_pipeline())
    random_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="for WanPipeline; use WanT2VPipeline"):
        WanI2VPipeline.from_pretrained(tmp_path)


def test_the_embedded_checkpoint_is_named_too():
    with pytest.raises(ValueError, match="use WanT2VPipeline"):
        WanI2VPipeline.from_pretrained(wan22.tiny_checkpoint("t2v"))


# ---- errors ----


def given(**arguments):
    return lambda pipe: latents(pipe, **{"image": photo(), **arguments})


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        (random_i2v_pipeline, given(image=None), "image is None"),
        (random_i2v_pipeline, given(fit="zoom"), "fit='zoom' must be one of 'crop', 'pad', 'stretch'"),
        (random_i2v_pipeline, given(width=None), "give height and width, or neither"),
        (random_i2v_pipeline, given(height=40), "height=40 .* multiple of 16; the nearest are 32 and 48"),
        (
            random_i2v_pipeline,
            given(max_area=0),
            "max_area=0 must be .* 256; the nearest is 256",
        ),
        (
            random_i2v_pipeline,
            given(max_area=100),
            "max_area=100 must be .* 256; the nearest is 256",
        ),
        (random_i2v_pipeline, given(max_area=4096, height=32, width=32), "max_area and height and width"),
        (random_i2v_pipeline, given(image=photo(300, 30), max_area=4096), "300x30 .* from 1:8 to 8:1"),
        (random_i2v_pipeline, given(image=photo(1, 600)), "1x600 pixels; each side must have at least 16"),
        (random_i2v_pipeline, given(image=[photo()] * 3, prompt=["a", "b"]), "prompt has 2 entries for 3"),
        (
            random_i2v_pipeline,
            given(image=[photo()] * 3, last_image=[photo()] * 2),
            "2 last images for 3 images; give 3, or one",
        ),
        (
            random_i2v_pipeline,
            given(image=[photo(64, 32), photo(32, 64)], max_area=2048),
            "different sizes, 64x32, 32x64",
        ),
        (random_i2v_pipeline, given(num_frames=1, last_image=photo()), "num_frames=1 has no room"),
        (random_i2v_pipeline, given(image_embeds=torch.zeros(1, 5, 24)), "this checkpoint takes none"),
        (random_ti2v_pipeline, given(last_image=photo()), "TI2V-5B was not trained for last_image"),
        (random_ti2v_pipeline, given(image=None, last_image=photo()), "image is None"),
        (random_ti2v_pipeline, given(image=None, max_area=4096), "max_area and fit are about images"),
        (random_ti2v_pipeline, given(image=None, fit="pad"), "max_area and fit are about images"),
        (lambda: random_i2v_pipeline(1), given(last_image=photo()), "takes no last_image; use its FLF"),
        (lambda: random_i2v_pipeline(1, True), given(), "last_image is None; this FLF checkpoint needs"),
        (lambda: random_i2v_pipeline(1, image_encoder=None), given(), "pipe.image_encoder is None"),
        (
            lambda: random_i2v_pipeline(1),
            given(image_embeds=torch.zeros(3, 5, 24)),
            r"\(3, 5, 24\); for 1 videos it must be \(1, l, 24\)",
        ),
    ],
)
def test_errors(make, call, message):
    with pytest.raises(ValueError, match=message):
        call(make())


def test_errors_come_before_any_work(i2v):
    with recording(i2v) as calls, pytest.raises(ValueError, match="num_frames=6"):
        latents(i2v, photo(), num_frames=6)
    assert not calls


def test_components_of_another_kind_are_refused():
    """Models at once; settings, which `components` leaves out, when a video is to be made."""
    pipe = random_i2v_pipeline(expand_timesteps=True)
    with pytest.raises(ValueError, match="takes 36 channels; image to video needs 16"):
        latents(pipe, photo())
    with pytest.raises(ValueError, match="48 latent channels, the VAE has 16"):
        random_i2v_pipeline(transformer=random_components(1, 48)["transformer"])
