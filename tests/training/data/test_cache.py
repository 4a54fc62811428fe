"""Encoding a data set: what the models give for the same frames, once, and again where it changes."""

import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests import builders
from tests.videos import frames_of, lossless
from wan22 import WanI2VPipeline, tiny_checkpoint
from wan22.checkpoints.converting import writing
from wan22.pipelines.call.images import Picture
from wan22.training.data import cache as caching
from wan22.training.data import encoding
from wan22.training.data.cache import cache, fill, plan
from wan22.training.data.cached import CachedClips
from wan22.training.data.config import DataConfig
from wan22.video.reading import read_frames, scan
from wan22.video.writers import write_encoded

SETTINGS = {"frames": (5, 9), "resolution": (64, 48)}


def normalised(vae, pixels):
    """Encode frames "t h w 3" in uint8 in one piece, by the formula of the normalisation."""
    x = torch.from_numpy(pixels.copy()).float().div(127.5).sub(1).permute(3, 0, 1, 2)[None]
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        return ((vae.encode(x).latent_dist.mode() - mean) / std)[0]


@pytest.fixture
def exact(tmp_path):
    """One lossless video of 9 frames, 64x48, at the rate of the random pipelines' presets."""
    folder = tmp_path / "exact"
    folder.mkdir()
    frames = frames_of(9)
    lossless(folder / "a.mkv", frames, 16)
    (folder / "a.txt").write_text("a red circle")
    return folder, frames


PIPES = {
    "t2v": builders.random_pipeline,
    "i2v": builders.random_i2v_pipeline,
    "ti2v": builders.random_ti2v_pipeline,
    "i2v, Wan 2.1": lambda: builders.random_i2v_pipeline(1),
    "flf2v": lambda: builders.random_i2v_pipeline(1, two_frames=True),
}


@pytest.mark.parametrize("name", PIPES)
def test_clips_are_what_the_models_make_of_the_frames(name, exact, tmp_path):
    folder, frames = exact
    pipe = PIPES[name]()
    resolution = (64, 32) if name == "ti2v" else (64, 48)
    clips = cache(pipe, folder, tmp_path / "out", frames=(9,), resolution=resolution, keep_fps=True)
    kind = name.partition(",")[0]
    assert (len(clips), clips.checkpoint["kind"]) == (1, kind)
    sample = clips.read(0)
    if name == "ti2v":  # 64x48 is cropped to the middle 32 rows
        frames = frames[:, 8:40]
    expected = normalised(pipe.vae, frames)
    assert sample.latents.dtype == torch.float32 and sample.latents.shape == clips.items[0].shape
    assert torch.allclose(sample.latents, expected, atol=1e-5, rtol=1e-5)
    prompt, _ = pipe.encode_prompt("a red circle", do_classifier_free_guidance=False)
    count = len("a red circle") + 1
    assert torch.equal(sample.text, prompt[0, :count]) and not prompt[0, count:].any()
    empty, _ = pipe.encode_prompt("", do_classifier_free_guidance=False)
    assert torch.equal(clips.empty_text, empty[0, :1])
    assert (sample.condition is None) == (kind not in ("i2v", "flf2v"))
    assert (sample.image_embeds is None) == (name not in ("i2v, Wan 2.1", "flf2v"))
    if sample.condition is not None:
        given = np.full_like(frames, 0).astype(np.float32) + 127.5
        given[0] = frames[0]
        mask = torch.zeros(4, *expected.shape[1:])
        mask[:, 0] = 1
        if kind == "flf2v":
            given[-1], mask[-1, -1] = frames[-1], 1
        assert torch.equal(sample.condition[:4], mask)
        assert torch.allclose(sample.condition[4:], normalised(pipe.vae, given), atol=1e-5, rtol=1e-5)
    if sample.image_embeds is not None:
        ends = frames[[0, -1]] if kind == "flf2v" else frames[:1]
        tokens = [pipe.encode_image(Image.fromarray(frame))[0] for frame in ends]
        assert torch.allclose(sample.image_embeds, torch.cat(tokens), atol=1e-6)


@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_a_checkpoint_loads_one_model_at_a_time_and_no_transformer(task, clips, tmp_path, monkeypatch):
    loaded = []
    load = WanI2VPipeline.from_pretrained.__func__

    def spy(cls, *args, **options):
        pipe = load(cls, *args, **options)
        loaded.append([n for n in builders.MODELS if getattr(pipe, n) is not None])
        return pipe

    planned = plan(tiny_checkpoint(task), clips, frames=(5,))
    monkeypatch.setattr(type(planned.encoders.outline), "from_pretrained", classmethod(spy))
    report = fill(planned, tmp_path / "out")
    assert loaded == [["vae"], ["text_encoder"]]
    assert (report.encoded, report.captions, report.kept, report.stale) == (2, 2, 0, ())
    assert report.clips.checkpoint["name"] == f"tiny-{task}"
    assert report.clips.read(0).text.dtype == torch.bfloat16
    again = fill(planned, tmp_path / "out")
    assert loaded[2:] == [["vae"]]  # the text encoder, which is the large one, has nothing to do
    assert (again.encoded, again.captions, again.kept) == (0, 0, 2)
    single = fill(plan(tiny_checkpoint(task), clips, frames=(5,), dtype=torch.float32), tmp_path / "out")
    assert (single.encoded, single.captions) == (0, 2) and single.clips.read(0).text.dtype == torch.float32


def test_a_clip_that_overlaps_others_has_the_frames_of_one_alone(tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    lossless(folder / "a.mkv", frames_of(20, 80, 60), 24)
    (folder / "a.txt").write_text("a")
    config = DataConfig(
        str(folder), (64, 48), (5, 9), "slide", every_length=True, stride=3, default_caption=""
    )
    items = plan(builders.random_pipeline(), config).items
    assert len(items) == 5 and {len(item.numbers) for item in items} == {5, 9}
    together = dict(encoding.clips_of_file(dict(enumerate(items))))
    assert sorted(together) == list(range(5))
    for key, item in enumerate(items):
        (alone,) = dict(encoding.clips_of_file({0: item})).values()
        assert all(map(torch.equal, alone, together[key]))
        video = scan(folder / "a.mkv")
        first = encoding.fitted(next(read_frames(video, item.numbers)), (64, 48))
        assert torch.equal(first, alone[0]) and first.shape == (3, 48, 64)


def test_frames_are_fitted_as_images_are():
    """Cropped to the middle, antialiased; a frame of the size stays as it is, to the bit."""
    frame = frames_of(1, 64, 48)[0]
    same = encoding.fitted(frame, (64, 48))
    assert torch.equal(same, torch.from_numpy(frame).float().div(255).sub(0.5).div(0.5).permute(2, 0, 1))
    noise = np.random.default_rng(0).integers(0, 256, (96, 256, 3), np.uint8)
    small = encoding.fitted(noise, (64, 48))
    assert small.abs().max() <= 1
    half = Image.fromarray(noise).resize((128, 48), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(half)[:, 32:96].copy()).float().div(127.5).sub(1).permute(2, 0, 1)
    assert (small - expected).abs().max() < 0.03  # Pillow rounds to 8 bits
    flat = encoding.antialiased(Picture(torch.full((3, 50, 40), 1.0)), (32, 32)).pixels
    assert torch.allclose(flat, torch.ones(3, 32, 32)) and flat.max() <= 1


def test_pictures_are_clips_of_one_frame(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    frame = frames_of(1)[0]
    Image.fromarray(frame).save(folder / "a.png")
    pipe = builders.random_pipeline()
    clips = cache(pipe, folder, tmp_path / "out", default_caption="", resolution=(64, 48), repeats=3)
    assert clips.items[0].shape == (16, 1, 6, 8) and clips.items[0].repeats == 3
    assert torch.allclose(clips.read(0).latents, normalised(pipe.vae, frame[None]), atol=1e-5)
    assert torch.equal(clips.read(0).text, clips.empty_text)


def test_latents_in_half_the_room(exact, tmp_path):
    pipe = builders.random_pipeline()
    latents = cache(pipe, exact[0], tmp_path / "a", **SETTINGS).read(0).latents
    half = cache(pipe, exact[0], tmp_path / "a", latents_dtype="bfloat16", prune=True, **SETTINGS)
    assert torch.equal(half.read(0).latents, latents.bfloat16().float())
    assert half.read(0).latents.dtype == torch.float32
    stored = load_file(half.items[0].file)["latents"]
    assert stored.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="latents_dtype='fp16' must be one of"):
        cache(pipe, exact[0], tmp_path / "a", latents_dtype="fp16")


def test_a_long_video_is_never_held_whole(tmp_path, monkeypatch):
    folder = tmp_path / "long"
    folder.mkdir()
    lossless(folder / "a.mkv", frames_of(60), 16)
    config = DataConfig(str(folder), (64, 48), (5,), "slide", stride=2, default_caption="")
    items = plan(builders.random_pipeline(), config).items
    fit, frames, most = encoding.fitted, weakref.WeakSet(), 0

    def fitted(*arguments):
        nonlocal most
        frame = fit(*arguments)
        frames.add(frame)
        most = max(most, len(frames))
        return frame

    monkeypatch.setattr(encoding, "fitted", fitted)
    for _, clip in encoding.clips_of_file(dict(enumerate(items))):
        del clip
    assert len(items) == 28 and 5 <= most <= 8


# ---- again ----


def state(folder):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def test_what_is_there_is_kept_and_what_changes_is_encoded(clips, tmp_path):
    pipe, out = builders.random_pipeline(), tmp_path / "out"

    def again(**settings):
        prune = settings.pop("prune", False)
        report = fill(plan(pipe, clips, **{**SETTINGS, **settings}), out, prune=prune)
        return report.encoded, report.captions, report.kept, len(report.stale)

    assert again() == (2, 2, 0, 0)
    before = state(out)
    assert again() == (0, 0, 2, 0)
    assert {name for name, entry in state(out).items() if entry != before[name]} == {
        "clips.json",
        "scans.json",
    }
    tensors = {path.name: load_file(path) for path in out.glob("wide*.safetensors")}
    (clips / "wide.txt").write_text("another caption")
    assert again() == (0, 1, 2, 0)
    for name, old in tensors.items():
        new = load_file(out / name)
        assert torch.equal(new["latents"], old["latents"]) and new["text"].shape != old["text"].shape
        with safe_open(out / name, "pt") as file:
            assert file.metadata()["caption"] == "another caption"
    assert again(repeats=3) == (0, 0, 2, 0)
    assert {item.repeats for item in CachedClips.open(out).items} == {3}
    # Other sizes are other files; the old ones are named, and kept until they are to go.
    assert again(resolution=(80, 64)) == (2, 2, 0, 2)
    assert again() == (0, 0, 2, 2)
    assert again(prune=True) == (0, 0, 2, 2)
    assert again() == (0, 0, 2, 0)
    # Another file of the same name, size and length is another clip.
    write_encoded(iter(frames_of(9, seed=5)), clips / "wide.mp4", 8)
    assert again() == (1, 1, 1, 1)
    # Other models encode all anew, each what it makes.
    other = builders.random_pipeline(text_encoder=builders.random_text_encoder(9))
    assert fill(plan(other, clips, **SETTINGS), out).captions == 2
    vae = builders.random_pipeline(vae=builders.random_vae(9), text_encoder=other.text_encoder)
    assert fill(plan(vae, clips, **SETTINGS), out).encoded == 2


def test_a_run_that_goes_on_decodes_nothing_again(clips, tmp_path, monkeypatch):
    pipe, out = builders.random_pipeline(), tmp_path / "out"
    first = cache(pipe, clips, out, **SETTINGS)
    monkeypatch.setattr("wan22.training.data.scans.scan", lambda path: pytest.fail(f"it decodes {path}"))
    assert cache(pipe, clips, out, **SETTINGS).items == first.items
    write_encoded(iter(frames_of(9, seed=5)), clips / "wide.mp4", 8)
    with pytest.raises(pytest.fail.Exception, match=r"it decodes .*wide\.mp4"):
        cache(pipe, clips, out, **SETTINGS)


def test_files_of_others_are_left_alone(clips, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(tiny_checkpoint("t2v") / "vae" / "diffusion_pytorch_model.safetensors", out)
    (out / ".wan22-0123456789abcdef.safetensors").write_bytes(b"half")
    report = fill(plan(builders.random_pipeline(), clips, **SETTINGS), out, prune=True)
    assert report.stale == (".wan22-0123456789abcdef.safetensors",)
    assert (out / "diffusion_pytorch_model.safetensors").exists()
    assert not (out / report.stale[0]).exists()


@pytest.mark.parametrize("name", ["encode_clip", "encode_caption"])
def test_an_interrupted_run_goes_on(name, clips, tmp_path, monkeypatch):
    pipe, out = builders.random_pipeline(), tmp_path / "out"
    whole = cache(pipe, clips, tmp_path / "whole", **SETTINGS)
    calls, encode = [], getattr(caching, name)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(caching, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache(pipe, clips, out, **SETTINGS)
    with pytest.raises(FileNotFoundError, match=r"has no clips\.json; run `wan22 cache` again, it goes on"):
        CachedClips.open(out)
    assert not list(out.glob(".wan22-*"))
    report = fill(plan(pipe, clips, **SETTINGS), out)
    assert report.encoded == (1 if name == "encode_clip" else 0) and report.captions == 2
    for i, item in enumerate(whole.items):
        mine = load_file(report.clips.items[i].file)
        theirs = load_file(item.file)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(clips, tmp_path):
    """As the system ends a process: at once."""
    for i in range(2):
        shutil.copy(clips / "wide.mp4", clips / f"more{i}.mp4")
        (clips / f"more{i}.txt").write_text(f"number {i}")
    out, size = tmp_path / "out", "96x64"
    start = [sys.executable, "-m", "wan22.cli", "cache", clips, "--resolution", size, "-q", "-o"]
    command = [*start, out]
    # By a process of its own, too: the number of threads changes rounding.
    subprocess.run([*start, tmp_path / "whole"], check=True)
    whole = CachedClips.open(tmp_path / "whole")
    for count in (1, 3):
        process = subprocess.Popen(command, start_new_session=True)
        while len(list(out.glob("*_*x*.safetensors"))) < count and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(FileNotFoundError):
            CachedClips.open(out)
    subprocess.run([*command, "--prune"], check=True)
    found = CachedClips.open(out)
    assert [item.file.name for item in found.items] == [item.file.name for item in whole.items]
    for i in range(len(found)):
        assert torch.equal(found.read(i).latents, whole.read(i).latents)
        assert torch.equal(found.read(i).text, whole.read(i).text)
    assert len(list(out.glob("*.safetensors"))) == len(found) + 1 and not list(out.glob(".wan22-*"))


def test_a_damaged_file_is_encoded_again(clips, tmp_path, caplog):
    pipe, out = builders.random_pipeline(), tmp_path / "out"
    clips_of = cache(pipe, clips, out, **SETTINGS)
    expected = {n: tensor.clone() for n, tensor in load_file(clips_of.items[0].file).items()}
    data = clips_of.items[0].file.read_bytes()
    for damaged in (data[:-100], data[:50], b"", b"\xff" * 5000):
        clips_of.items[0].file.write_bytes(damaged)
        report = fill(plan(pipe, clips, **SETTINGS), out)
        assert (report.encoded, report.captions, report.kept, report.stale) == (1, 1, 1, ())
        assert all(torch.equal(t, expected[n]) for n, t in load_file(clips_of.items[0].file).items())
    assert "encoding again: " in caplog.text


def test_a_clip_with_two_captions_is_two_clips(clips, tmp_path):
    rows = [f'{{"video": "wide.mp4", "caption": "{text}"}}' for text in ("one", "two", "two")]
    (clips / "list.jsonl").write_text("\n".join(rows))
    found = cache(builders.random_pipeline(), clips / "list.jsonl", tmp_path / "out", **SETTINGS)
    assert [item.caption for item in found.items] == ["one", "two", "two"]
    assert len({item.file for item in found.items}) == 3
    assert torch.equal(found.read(0).latents, found.read(1).latents)


# ---- what is refused ----


def test_the_room_is_looked_at_before_anything_is_encoded(clips, tmp_path, monkeypatch):
    pipe = builders.random_pipeline()
    planned = plan(pipe, clips, **SETTINGS)
    monkeypatch.setattr(writing, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(caching, "encode_clip", lambda *_: pytest.fail("it encodes"))
    with pytest.raises(OSError, match=r"out needs .* GB more, but its disk has 1e-06 GB left"):
        fill(planned, tmp_path / "out")
    monkeypatch.undo()
    found = fill(planned, tmp_path / "out").clips
    sizes = [item.file.stat().st_size for item in found.items]
    assert all(size <= planned.nbytes(item) for size, item in zip(sizes, planned.items, strict=True))
    assert sum(sizes) > 0.5 * sum(map(planned.nbytes, planned.items))


def test_a_full_disk_names_the_file(clips, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=r"_48x64_\w+\.safetensors could not be written whole"):
        cache(builders.random_pipeline(), clips, tmp_path / "out", **SETTINGS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scans.json"]


def test_what_cannot_encode(clips, tmp_path):
    with pytest.raises(ValueError, match="encoded by vae, text_encoder and tokenizer; load all three"):
        plan(builders.random_pipeline(text_encoder=None), clips)
    half = builders.random_pipeline(vae=builders.random_vae(3).bfloat16())
    with pytest.raises(
        ValueError, match=r"pipe\.vae is in torch\.bfloat16; latents are encoded in torch\.fl"
    ):
        plan(half, clips)
    with pytest.raises(FileNotFoundError):
        plan(tmp_path, clips)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        cache(builders.random_pipeline(), clips, tmp_path / "file")
    vae = builders.random_vae(3)
    vae.encoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"tall\.mp4: .*not finite"):
        cache(builders.random_pipeline(vae=vae), clips, tmp_path / "out", **SETTINGS)


def test_a_mark_is_of_the_weights_that_encode():
    one, other = builders.random_vae(3), builders.random_vae(3)
    assert encoding.mark_of(one) == encoding.mark_of(other) != encoding.mark_of(builders.random_vae(4))
    other.decoder.conv_out.bias.data += 1
    assert encoding.mark_of(one) == encoding.mark_of(other)
    other.encoder.conv_out.bias.data += 1
    assert encoding.mark_of(one) != encoding.mark_of(other)
    assert encoding.mark_of(one) != encoding.mark_of(builders.random_vae(3).bfloat16())
    with pytest.raises(ValueError, match="has no weights in memory"):
        encoding.mark_of(builders.random_vae(3).to("meta"))
