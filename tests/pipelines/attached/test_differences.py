"""What reproduce refuses by name, and with anyway=True warns of: pictures, quantisation, weights."""

import copy
import json
import logging
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.builders import random_i2v_pipeline, random_pipeline
from wan22 import WanT2VPipeline, read_recipe, tiny_checkpoint
from wan22.accel.quantize import dequantize, quantize
from wan22.pipelines.call.images import load_picture
from wan22.video.recipe import Recipe

QUICK = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "seed": 1}


def photo(seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((32, 32))


def older(recipe, **entries):
    """Return a recipe as an earlier version wrote it, and as it is read."""
    values = json.loads(recipe.to_json()) | entries
    del values["pictures"], values["memory"]
    return Recipe.from_json(json.dumps(values))


@pytest.fixture
def pipe():
    return random_pipeline(
        **{n: copy.deepcopy(getattr(random_pipeline(), n)) for n in ("transformer", "vae")}
    )


@pytest.fixture
def recipe(pipe):
    return pipe("a", output_type="latent", **QUICK).recipe


# ---- pictures ----


def test_the_fingerprint_is_of_the_pixels(tmp_path):
    photo().save(tmp_path / "a.png")
    photo().save(tmp_path / "b.bmp")
    photo().save(tmp_path / "c.jpg")
    values = np.asarray(photo())
    mark = load_picture("image", photo()).mark
    for same in (tmp_path / "a.png", tmp_path / "b.bmp", values, torch.tensor(values).permute(2, 0, 1)):
        assert load_picture("image", same).mark == mark
    turned = values.transpose(1, 0, 2)[:, :16]
    for other in (tmp_path / "c.jpg", photo(1), values[:, :16], turned, 255 - values):
        assert load_picture("image", other).mark != mark
    large = np.random.default_rng(0).integers(0, 256, (200, 16, 3), np.uint8)
    changed = large.copy()
    changed[-1, -1, -1] ^= 1
    assert load_picture("image", large).mark != load_picture("image", changed).mark


def test_another_picture_is_refused(tmp_path, caplog):
    pipe = random_i2v_pipeline()
    photo().save(tmp_path / "cat.png")
    video = pipe(tmp_path / "cat.png", "a", last_image=photo(1), **QUICK)
    (file,) = video.save(tmp_path / "cat.mp4")
    assert str(tmp_path).encode() not in file.read_bytes()
    assert {name: len(marks) for name, marks in read_recipe(file).pictures.items()} == {
        "image": 1,
        "last_image": 1,
    }
    given = {"image": photo(), "last_image": photo(1)}
    assert np.array_equal(pipe.reproduce(file, **given).frames, video.frames)
    with pytest.raises(
        ValueError, match=r"^image has other pixels than the recipe's picture; anyway=True makes"
    ):
        pipe.reproduce(file, **given | {"image": photo(2)})
    with pytest.raises(ValueError, match="last_image has other pixels"):
        pipe.reproduce(file, **given | {"last_image": photo()})
    caplog.clear()
    other = pipe.reproduce(file, anyway=True, **given | {"image": photo(2)})
    assert not np.array_equal(other.frames, video.frames)
    assert "image has other pixels than the recipe's picture; the video is another" in caplog.text
    photo(2).save(tmp_path / "cat.png")  # the path is as it was
    with pytest.raises(ValueError, match="image has other pixels"):
        pipe.reproduce(video.recipe, last_image=photo(1))


def test_one_picture_of_several(tmp_path):
    pipe = random_i2v_pipeline()
    pictures = [photo(0), photo(1)]
    videos = pipe(
        pictures, ["a", "b"], last_image=photo(3), num_videos_per_prompt=2, **QUICK, output_type="latent"
    )
    recipe = videos.recipe
    assert recipe.of(1).pictures["image"] == recipe.pictures["image"][:1] != recipe.of(2).pictures["image"]
    assert recipe.of(3).pictures["last_image"] == recipe.pictures["last_image"]
    again = pipe.reproduce(recipe.of(3), image=photo(1), last_image=photo(3), output_type="latent")
    assert torch.equal(again.frames[0], videos.frames[3])
    with pytest.raises(ValueError, match=r"image\[1\] has other pixels"):
        pipe.reproduce(recipe, image=[photo(0), photo(0)], last_image=photo(3))


def test_a_recipe_without_fingerprints(caplog):
    pipe = random_i2v_pipeline()
    video = pipe(photo(), "a", last_image=photo(1), output_type="latent", **QUICK)
    again = pipe.reproduce(older(video.recipe), image=photo(), last_image=photo(1), output_type="latent")
    assert torch.equal(again.frames, video.frames)
    assert "the recipe's image, last_image: has no fingerprint" in caplog.text


# ---- quantisation and other changes ----


def test_another_quantisation_is_refused(pipe, recipe, caplog):
    other = copy.deepcopy(pipe)
    quantize(pipe.transformer, "int8")
    quantize(other.transformer, "fp8")
    made = pipe("a", output_type="latent", **QUICK)
    for wrong in (other, random_pipeline()):
        with pytest.raises(ValueError, match=r"made with changes .*int8.*this pipeline has (.*fp8|\{\})"):
            wrong.reproduce(made.recipe)
    with pytest.raises(ValueError, match=r"made with changes \{\}; this pipeline has .*int8"):
        pipe.reproduce(recipe)
    assert torch.equal(pipe.reproduce(made.recipe, output_type="latent").frames, made.frames)
    caplog.clear()
    assert not torch.equal(
        other.reproduce(made.recipe, anyway=True, output_type="latent").frames, made.frames
    )
    assert "the recipe was made with changes" in caplog.text and "the video is another" in caplog.text
    dequantize(pipe.transformer)
    with pytest.raises(ValueError, match=r"this pipeline has .*int8, expanded"):
        pipe.reproduce(recipe)


@pytest.mark.parametrize(
    ("change", "other"),
    [
        (lambda p: p.vae.enable_tiling(), lambda p: p.vae.enable_tiling(tile_sample_min_height=320)),
        (
            lambda p: p.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1)),
            lambda p: p.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2)),
        ),
        (
            lambda p: quantize(p.transformer, "int8"),
            lambda p: quantize(p.transformer, "int8", block=16),
        ),
        (
            lambda p: None,
            lambda p: p.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        ),
    ],
    ids=["tiles", "step cache", "groups", "casting"],
)
def test_other_settings_of_a_change_are_refused(change, other, pipe, recipe):
    second = copy.deepcopy(pipe)
    change(pipe)
    other(second)
    made = replace(recipe, changes=pipe.acceleration.changes())
    pipe.provenance.check(Recipe.from_json(made.to_json()))
    with pytest.raises(ValueError, match="the recipe was made with changes"):
        second.provenance.check(made)


def test_what_earlier_versions_wrote_of_changes(pipe, recipe, caplog):
    names = older(recipe, changes={"quantized": ["transformer"], "tiled": True, "accelerated": True})
    quantize(pipe.transformer, "int8")
    pipe.vae.enable_tiling()
    with pytest.raises(ValueError, match="made with changes"):
        pipe.provenance.check(names)
    pipe.acceleration.accelerated = True
    pipe.provenance.check(names)
    assert "without its settings, quantized, tiled: an earlier version wrote it" in caplog.text
    with pytest.raises(ValueError, match="made with changes"):
        pipe.provenance.check(older(recipe, changes={**names.changes, "quantized": ["transformer_2"]}))


def test_tokens_in_parts_move_the_video_by_rounding(pipe, recipe, caplog):
    pipe.transformer.set_token_chunks(2)
    pipe.provenance.check(recipe)
    assert "['token_parts'] differ from the recipe's: results may differ by rounding" in caplog.text


# ---- weights, and what nobody knows ----


def test_weights_of_no_file_are_told(pipe, recipe, caplog):
    pipe.provenance.check(recipe)
    assert "the weights of text_encoder, transformer, transformer_2, vae: are of no file" in caplog.text
    loaded = WanT2VPipeline.from_pretrained(tiny_checkpoint())
    known = loaded("a", output_type="latent", **QUICK).recipe
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        loaded.provenance.check(known)
    assert not caplog.records
    loaded.transformer = copy.deepcopy(loaded.transformer)
    loaded.provenance.check(replace(known, origin=loaded.provenance.origin()))
    assert "the weights of transformer: are of no file" in caplog.text


def test_all_that_differs_is_named(recipe):
    other = random_pipeline(boundary_ratio=0.5)
    changed = replace(recipe, dtypes={"vae": "float16"}, not_reproducible_because="latents were given")
    with pytest.raises(
        ValueError, match=r"latents were given; .*dtypes.*; the recipe's boundary_ratio is 0.875"
    ):
        other.provenance.check(changed)
    other.provenance.check(changed, anyway=True)
    with pytest.raises(ValueError, match="one of WanT2VPipeline, this is a WanI2VPipeline"):
        random_i2v_pipeline().reproduce(recipe, anyway=True)


# ---- what a recipe lacks ----


def test_without_its_prompt_a_video_is_made_again_once_it_is_given(pipe, tmp_path):
    video = pipe("a kite", "fog", guidance_scale=2, **QUICK)
    (file,) = video.save(tmp_path / "a.mp4", prompt=False)
    with pytest.raises(ValueError, match=r"the recipe has no prompt: it was saved without, .*; give prompt="):
        pipe.reproduce(file)
    with pytest.raises(ValueError, match=r"the recipe has no negative_prompt: .*; give negative_prompt="):
        pipe.reproduce(file, prompt="a kite")
    again = pipe.reproduce(file, prompt="a kite", negative_prompt="fog")
    assert again == video


def test_without_a_seed_one_is_given(pipe):
    few = {**QUICK, "seed": None, "output_type": "latent"}
    recipe = pipe(["a", "b"], generator=torch.Generator(), **few).recipe
    assert recipe.seeds[1] is None
    with pytest.raises(ValueError, match="noise was drawn from one generator"):
        pipe.reproduce(recipe)
    with pytest.raises(ValueError, match="the recipe has no seed: the noise was given; give seed="):
        pipe.reproduce(recipe, anyway=True)
    assert pipe.reproduce(recipe, anyway=True, seed=[1, 2], output_type="latent").recipe.seeds == (1, 2)
