"""A LoRA that was trained for the embedded checkpoint: its effect is seen, whatever dialect it is written in.

It makes every object purple, whatever colour the prompt asks for; see examples/tiny/train_lora.py.
"""

import copy
from pathlib import Path

import clips
import judge
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import writers
from tests.checkpoints.lora_writers import DIALECTS, in_diffusers
from tests.golden_data import relative_error
from tests.tiers import slow
from wan22 import WanI2VPipeline, WanT2VPipeline, tiny_checkpoint
from wan22.checkpoints.naming.keys import TRANSFORMER
from wan22.checkpoints.quantized_linear import QuantizedLinear

FOLDER = Path(__file__).parents[1] / "loras"
FILES = {"transformer": "purple_high.safetensors", "transformer_2": "purple_low.safetensors"}
# Every dialect is tested on a random model, too.
first, *others = DIALECTS
SCENES = [s for s in judge.choose_scenes(30, 0, "held_out", clips.CORE_MOTIONS) if s.color != "purple"][:10]


def tables():
    """Return both files' matrices, in float32, by official module names."""
    result = {}
    for slot, name in FILES.items():
        file = load_file(FOLDER / name)
        modules = {
            key.removeprefix("diffusion_model.").removesuffix(".alpha") for key in file if "alpha" in key
        }
        keys = {module: f"diffusion_model.{module}" for module in modules}
        result[slot] = {
            module: (
                file[f"{key}.lora_down.weight"].float(),
                file[f"{key}.lora_up.weight"].float(),
                file[f"{key}.alpha"].item(),
            )
            for module, key in keys.items()
        }
    return result


@pytest.fixture(scope="module")
def loaded():
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded):
    yield loaded
    loaded.unload_lora_weights()


def colors(pipe, scenes):
    videos = judge.generate(pipe, [clips.canonical(s) for s in scenes], 0, len(scenes), None)
    return [judge.judge(video).color for video in videos], judge.score(
        scenes, [judge.judge(v) for v in videos]
    )


def test_its_effect_is_seen_and_goes_with_its_strength(pipe):
    pipe.load_lora_weights(high=FOLDER / FILES["transformer"], low=FOLDER / FILES["transformer_2"])
    seen, scores = colors(pipe, SCENES)
    assert seen.count("purple") >= 0.8 * len(SCENES)
    assert min(scores["background"], scores["motion"]) >= 0.8, "nothing else changes"
    pipe.set_adapters("default_0", 0.0)
    seen, scores = colors(pipe, SCENES)
    assert seen.count("purple") == 0
    assert scores["color"] >= 0.9


@pytest.fixture(scope="module")
def merged(loaded):
    """Two videos of merged weights."""
    pipe = copy.deepcopy(loaded)
    with torch.no_grad():
        for slot, table in tables().items():
            for module, (down, up, alpha) in table.items():
                layer = getattr(pipe, slot).get_submodule(in_diffusers(module))
                layer.weight += alpha / down.shape[0] * (up @ down)
    return two_videos(pipe)


def two_videos(pipe):
    return pipe([clips.canonical(s) for s in SCENES[:2]], seed=3, output_type="np").frames


@pytest.mark.parametrize("dialect", [first, *slow(others)])
def test_every_dialect_gives_the_video_of_the_merged_weights(dialect, pipe, merged, tmp_path):
    for slot, table in tables().items():
        file = {key: tensor.contiguous() for key, tensor in DIALECTS[dialect](table).items()}
        save_file(file, tmp_path / f"{slot}.safetensors")
    pipe.load_lora_weights(
        high=tmp_path / "transformer.safetensors", low=tmp_path / "transformer_2.safetensors"
    )
    frames = two_videos(pipe)
    assert relative_error(torch.from_numpy(frames), torch.from_numpy(merged)) <= 1e-5
    read = [judge.judge((video * 255).astype("uint8")) for video in frames]
    assert [verdict.color for verdict in read] == ["purple"] * 2


@pytest.mark.slow
def test_on_gguf_files(pipe, tmp_path):
    """Both experts in blocks of 8 bits, the LoRA beside them."""
    files = {}
    for slot in FILES:
        weights = getattr(pipe, slot).state_dict()
        official = {TRANSFORMER.inverse.rename(name): w.contiguous() for name, w in weights.items()}
        files[slot] = tmp_path / f"{slot}.gguf"
        writers.write_gguf(official, files[slot], "Q8_0")
    other = WanT2VPipeline.from_single_file(
        *files.values(),
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        scheduler=pipe.scheduler,
        dtype=torch.float32,
        attention_head_dim=64,
    )
    other.set_progress_bar_config(disable=True)
    assert isinstance(other.transformer.blocks[0].attn1.to_q, QuantizedLinear)
    seen, scores = colors(other, SCENES[:4])
    assert scores["color"] == 1
    other.load_lora_weights(high=FOLDER / FILES["transformer"], low=FOLDER / FILES["transformer_2"])
    seen, scores = colors(other, SCENES[:4])
    assert seen.count("purple") >= 3
    with pytest.raises(ValueError, match=r"quantised, and fusing needs .*fuse_lora\(dequantize=True\)"):
        other.fuse_lora()


@pytest.mark.slow
def test_in_the_image_to_video_model(caplog):
    """Trained for text to video, it fits there, too; the given frame stays as it is."""
    pipe = WanI2VPipeline.from_pretrained(tiny_checkpoint("i2v"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with caplog.at_level("WARNING", "wan22"):
        pipe.load_lora_weights(high=FOLDER / FILES["transformer"], low=FOLDER / FILES["transformer_2"])
    assert not caplog.records
    given = judge.given_frames(SCENES[:2], 0, 64, False)
    prompts = [clips.canonical(s) for s in SCENES[:2]]
    with_it = judge.generate(pipe, prompts, 0, 2, None, given)
    pipe.unload_lora_weights()
    assert np.abs(with_it.astype(int) - judge.generate(pipe, prompts, 0, 2, None, given)).mean() > 1
