"""The training of the embedded checkpoints: it runs end to end, and gives what the pipelines will give."""

import runpy
import sys
from pathlib import Path

import cache_latents
import pytest
import torch
import train_transformer
from PIL import Image
from train_vae import CONFIGS

import wan22
from wan22.pipelines.call.conditions import FirstFrameCondition, NoCondition

SCRIPTS = Path(__file__).parents[2] / "examples" / "tiny"


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    """Run a training script as the command line would, in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path), "--threads", "1", *options])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")

    return run


@pytest.mark.slow
def test_scripts_make_checkpoints_that_the_pipelines_load(run_script, tmp_path, capsys):
    run_script("train_vae.py", "--smoke")
    run_script("train_vae.py", "--smoke", "--resume")  # nothing is left to train; the results are the same
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round trip")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    run_script("train_vae.py", "--smoke", "--vae", "vae22")
    vae22 = wan22.AutoencoderKLWan.from_pretrained(tmp_path / "vae22")
    assert f"latent standard deviations: {vae22.config.latents_std}" in capsys.readouterr().out
    run_script("cache_latents.py", "--smoke")
    run_script("cache_latents.py", "--smoke", "--conditions")
    run_script("cache_latents.py", "--smoke", "--vae", "vae22")
    for part in train_transformer.PARTS:
        run_script("train_transformer.py", "--smoke", "--part", part)
    for name in ("t2v", "i2v", "ti2v"):
        run_script("export.py", "--checkpoint", name, "--to", str(tmp_path / name))

    pipe = wan22.WanT2VPipeline.from_pretrained(tmp_path / "t2v")
    assert pipe.config.boundary_ratio == 0.875
    assert each_expert_has_its_own_weights(pipe)
    small = {"prompt": "a red circle", "num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 5}
    assert pipe(**small).frames[0].shape == (5, 32, 32, 3)

    image = Image.new("RGB", (32, 32), "blue")
    pipe = wan22.WanI2VPipeline.from_pretrained(tmp_path / "i2v")
    assert pipe.preset.name == "tiny-i2v"
    assert pipe.config.boundary_ratio == 0.9
    assert each_expert_has_its_own_weights(pipe)
    assert pipe(image, last_image=image, **small).frames[0].shape == (5, 32, 32, 3)

    for pipeline, given in ((wan22.WanT2VPipeline, {}), (wan22.WanI2VPipeline, {"image": image})):
        pipe = pipeline.from_pretrained(tmp_path / "ti2v")
        assert pipe.preset.name == "tiny-ti2v"
        assert pipe.config.expand_timesteps
        assert pipe(**given, **small).frames[0].shape == (5, 32, 32, 3)


def each_expert_has_its_own_weights(pipe):
    high, low = pipe.transformer.state_dict(), pipe.transformer_2.state_dict()
    return high.keys() == low.keys() and any(not torch.equal(high[name], low[name]) for name in high)


# ---- what is given beside the text ----


@pytest.fixture(scope="module")
def vae():
    return wan22.AutoencoderKLWan.from_pretrained(wan22.tiny_checkpoint("t2v") / "vae", dtype=torch.float32)


@pytest.fixture(scope="module")
def encoded(vae):
    """Four training clips with their conditions, in float32, and their frames."""
    seed = [0, 0, 0]
    clips = cache_latents.encode_clips(vae, 4, seed, "train")
    clips |= cache_latents.encode_conditions(vae, 4, seed, "train")
    clips.pop("captions")
    frames = next(cache_latents.draw_clips(4, seed, "train", 64))[0]
    return {name: x.float() for name, x in clips.items()}, frames


@pytest.mark.parametrize("last", [False, True])
def test_given_frames_are_those_of_the_pipeline(vae, encoded, monkeypatch, last):
    clips, frames = encoded
    monkeypatch.setattr(train_transformer, "LAST_FRAME", float(last))
    levels, channels = train_transformer.frames_in_channels(clips, torch.full((4,), 0.5))
    assert levels.shape == (4, 1)
    images = ((frames[:, :, [0, -1]] + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    pipe = i2v_pipeline(vae)
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    options = {"last_image": list(images[:, 1])} if last else {}
    sizes = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 1, "guidance_scale": 1.0}
    embeds = torch.zeros(4, 512, 64)
    pipe(list(images[:, 0]), prompt_embeds=embeds, output_type="latent", **sizes, **options)
    torch.testing.assert_close(torch.cat(seen)[:, 16:], channels, atol=5e-3, rtol=5e-3)


def i2v_pipeline(vae):
    part = train_transformer.PARTS["i2v-low"]
    transformer = train_transformer.VideoModel(8, part).transformer.eval()
    scheduler = wan22.FlowMatchUniPCScheduler()
    return wan22.WanI2VPipeline(None, None, vae, scheduler, transformer=transformer)


@pytest.fixture(scope="module")
def ti2v():
    torch.manual_seed(0)
    return train_transformer.VideoModel(8, train_transformer.PARTS["ti2v"]).eval()


@pytest.mark.parametrize("given", [False, True])
def test_timesteps_are_those_of_the_pipeline(ti2v, monkeypatch, given):
    """One per token here, one per latent frame there; those of a given first frame are 0."""
    monkeypatch.setattr(train_transformer, "FIRST_FRAME", float(given))
    clips = {"latents": torch.randn(2, 48, 3, 4, 6)}
    sigma = torch.tensor([0.25, 0.75])
    levels, channels = train_transformer.first_frame_in_place(clips, sigma)
    assert channels.shape[1] == 0
    seen = []
    hook = ti2v.transformer.register_forward_pre_hook(lambda model, args: seen.append(args[:2]))
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    loss = train_transformer.loss_of(ti2v, lambda *_: (levels, channels), clips, sigma, ids, mask)
    hook.remove()
    x, timestep = seen[0]
    assert torch.equal(x[:, :, 0], clips["latents"][:, :, 0]) == given
    condition = FirstFrameCondition(x[:, :, :1]) if given else NoCondition()
    for i, s in enumerate(sigma):
        expected = condition.model_inputs(i, x[i : i + 1], s[None] * 1000)["timestep"]
        per_token = expected.repeat_interleave(3 * 2 * 3 // expected.numel())
        assert torch.equal(timestep[i], per_token)
    assert loss.shape == (2,)


def test_given_frames_do_not_count(ti2v, monkeypatch):
    """The untrained model predicts its bias alone, so the loss is known."""
    monkeypatch.setattr(train_transformer, "FIRST_FRAME", 1.0)
    noise = torch.full((1, 48, 3, 4, 4), 2.0)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    monkeypatch.setattr(ti2v.transformer.proj_out, "bias", torch.nn.Parameter(torch.zeros(4 * 48)))
    clips = {"latents": torch.zeros(1, 48, 3, 4, 4)}
    clips["latents"][:, :, 0] = 100  # would show
    ids = torch.ones(1, 3, dtype=torch.long)
    condition = train_transformer.first_frame_in_place
    loss = train_transformer.loss_of(ti2v, condition, clips, torch.tensor([0.5]), ids, ids)
    assert loss.tolist() == [4.0]


def test_first_latent_frame_is_that_of_the_first_frame_alone():
    torch.manual_seed(0)
    sizes = CONFIGS["vae22"] | {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    vae = wan22.AutoencoderKLWan(**sizes).eval()
    frames = next(cache_latents.draw_clips(2, [0], "train", 64))[0]
    with torch.no_grad():
        clip, frame = (cache_latents.encode(vae, x).float() for x in (frames, frames[:, :, :1]))
    torch.testing.assert_close(clip[:, :, :1], frame, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(clip[:, :, 1:2], frame, atol=1e-2)


def test_new_channels_start_without_influence():
    base, expert, other = (
        train_transformer.VideoModel(8, train_transformer.PARTS[name]).eval()
        for name in ("base", "i2v-high", "ti2v")
    )
    torch.nn.init.normal_(base.transformer.proj_out.weight)
    weights = base.state_dict()
    train_transformer.adopt(expert, weights)
    x, given = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 20, 2, 4, 4)
    ids, level = torch.ones(1, 3, dtype=torch.long), torch.full((1, 1), 0.5)
    with torch.no_grad():
        before = base(x, level, ids, ids)
        after = expert(torch.cat((x, given), dim=1), level, ids, ids)
    torch.testing.assert_close(after, before)

    fresh = other.state_dict()["transformer.patch_embedding.weight"].clone()
    train_transformer.adopt(other, weights)
    differing = {name for name, w in other.state_dict().items() if not torch.equal(w, weights[name])}
    assert differing == {
        f"transformer.{name}" for name in ("patch_embedding.weight", "proj_out.weight", "proj_out.bias")
    }
    assert torch.equal(other.transformer.patch_embedding.weight, fresh)
    assert not other.transformer.proj_out.weight.any()
