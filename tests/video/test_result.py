"""The returned video: files that play, the contact sheet, and what happens when writing fails."""

import base64
import errno
import logging
import os
import re
import stat
import subprocess
from functools import partial

import imageio_ffmpeg
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from tests.waiting import until
from wan22 import WanVideo, read_recipe
from wan22.presets import PRESETS
from wan22.video import writers
from wan22.video.recipe import Recipe
from wan22.video.result import WanStream
from wan22.video.writers import write_encoded

H, W, T, FPS = 48, 64, 9, 12


def recipe(count=1, num_frames=T, versions=None, **call):
    settings = {
        "checkpoint": "test",
        "pipeline": "WanT2VPipeline",
        "call": {
            "prompt": ["a"] * count,
            "seed": list(range(count)),
            "num_videos_per_prompt": 1,
            "flow_shift": 3.0,
            "guidance_scale": 1.0,
        }
        | call,
        "height": H,
        "width": W,
        "num_frames": num_frames,
        "fps": FPS,
        "scheduler": "S",
        "num_inference_steps": 2,
        "boundary_ratio": None,
        "versions": versions or {},
    }
    return Recipe(**settings)


def clip(seed=0, height=H, width=W):
    """A saturated disc that moves over a coloured background; float32 "t h w c" in [0, 1]."""
    colours = np.array([[0.9, 0.1, 0.1], [0.1, 0.2, 0.9], [0.1, 0.8, 0.2]], dtype=np.float32)
    rows, columns = np.mgrid[:height, :width]
    frames = []
    for t in range(T):
        disc = (rows - height / 2) ** 2 + (columns - 12 - 4 * t) ** 2 < 100
        frames.append(np.where(disc[..., None], colours[seed % 3], colours[(seed + 1) % 3]))
    return np.stack(frames)


def video(count=1, **size):
    return WanVideo(frames=np.stack([clip(i, **size) for i in range(count)]), fps=FPS, recipe=recipe(count))


def read(path):
    """Decode a file: (information, frames "t h w 3" in 0 to 255)."""
    reader = imageio_ffmpeg.read_frames(str(path))
    information = next(reader)
    width, height = information["size"]
    return information, np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    (path,) = video().save(tmp_path_factory.mktemp("mp4") / "new" / "clip.mp4")
    return path


def test_every_frame_is_in_the_file(written):
    information, frames = read(written)
    assert len(frames) == T
    assert information["size"] == (W, H)
    assert information["fps"] == FPS
    assert information["codec"] == "h264"
    assert information["duration"] == pytest.approx(T / FPS, abs=0.02)


def test_the_colours_are_those_of_the_frames(written):
    _, frames = read(written)
    difference = frames.astype(int) - video().as_uint8()[0]
    assert np.abs(difference).mean() < 4
    background = difference[:, :4, :4]
    assert np.abs(background).max() <= 4, (
        "flat areas must come back nearly exact, or the matrix is the wrong one"
    )


def test_the_frames_are_in_order(written):
    _, frames = read(written)
    red = frames[..., 0].astype(int) - frames[..., 2]
    centres = [np.argwhere(frame > 0)[:, 1].mean() for frame in red]
    assert np.allclose(np.diff(centres), 4, atol=0.7)


def test_the_stream_is_what_browsers_play(written):
    told = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(written)], capture_output=True, text=True
    ).stderr
    stream = next(line for line in told.splitlines() if "Video:" in line)
    assert "h264" in stream
    # "bt709" alone means that matrix, primaries and transfer all are.
    assert re.search(r"yuv420p\(tv, bt709[,)]", stream), stream


def test_the_index_comes_first(written):
    data = written.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_nothing_else_is_left(written):
    assert [p.name for p in written.parent.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
    ("ending", "codec", "start"),
    [("mov", "h264", b"ftypqt"), ("mkv", "h264", b"matroska"), ("webm", "vp9", b"webm")],
)
def test_other_containers(ending, codec, start, tmp_path):
    (path,) = video().save(tmp_path / f"clip.{ending}")
    assert start in path.read_bytes()[:64]
    information, frames = read(path)
    assert (information["codec"], information["size"]) == (codec, (W, H))
    assert information["fps"] == pytest.approx(FPS, abs=0.01)
    assert len(frames) == T
    difference = frames.astype(int) - video().as_uint8()[0]
    assert np.abs(difference).mean() < 4
    assert np.abs(difference[:, :4, :4]).max() <= 4, "flat areas must come back nearly exact"


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv", "webm"])
def test_a_long_recipe_travels_whole(ending, tmp_path):
    given = recipe(prompt=["e" * 100_000])
    (path,) = WanVideo(frames=video().frames, fps=FPS, recipe=given).save(tmp_path / f"clip.{ending}")
    assert read_recipe(path) == given.of(0)


@pytest.mark.parametrize("size", [(2, 2), (16, 34), (50, 18)])
def test_sizes_are_not_padded(size, tmp_path):
    write_encoded(np.zeros((3, *size, 3), np.uint8), tmp_path / "a.mp4", 8)
    information, frames = read(tmp_path / "a.mp4")
    assert information["size"] == size[::-1]
    assert len(frames) == 3


def test_one_frame(tmp_path):
    write_encoded(np.full((1, 16, 16, 3), 200, np.uint8), tmp_path / "a.mp4", 16)
    _, frames = read(tmp_path / "a.mp4")
    assert frames.shape == (1, 16, 16, 3)
    assert np.abs(frames.astype(int) - 200).max() <= 2


@pytest.mark.parametrize("height_width", [(15, 16), (16, 15), (17, 33)])
def test_of_odd_sizes_the_last_row_and_column_are_repeated(height_width, tmp_path):
    h, w = height_width
    shades = np.zeros((2, h, w, 3), np.uint8) + np.uint8(60)
    shades[:, -1:, :], shades[:, :, -1:] = 200, 200
    write_encoded(shades, tmp_path / "a.mp4", 8, crf=0)
    information, frames = read(tmp_path / "a.mp4")
    assert information["size"] == (w + w % 2, h + h % 2)
    assert np.abs(frames[:, :h, :w].astype(int) - shades).max() <= 3, "nothing is rescaled"
    assert np.abs(frames[:, h:].astype(int) - 200).max(initial=0) <= 3
    assert np.abs(frames[:, :, w:].astype(int) - 200).max(initial=0) <= 3


# ---- names ----


def test_several_videos_are_numbered(tmp_path):
    paths = video(3).save(tmp_path / "clip.mp4")
    assert [p.name for p in paths] == ["clip-1.mp4", "clip-2.mp4", "clip-3.mp4"]
    for i, path in enumerate(paths):
        assert np.abs(read(path)[1].astype(int) - video(3).as_uint8()[i]).mean() < 4
    assert sorted(tmp_path.iterdir()) == paths


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "clip.mp4").write_text("mine")
    with pytest.raises(FileExistsError, match=r"clip\.mp4 exists; overwrite=True replaces it"):
        video().save(tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").read_text() == "mine"
    video().save(tmp_path / "clip.mp4", overwrite=True)
    assert len(read(tmp_path / "clip.mp4")[1]) == T


def test_of_several_names_one_exists(tmp_path):
    (tmp_path / "clip-2.mp4").write_text("mine")
    with pytest.raises(FileExistsError, match=r"clip-2\.mp4 exists"):
        video(3).save(tmp_path / "clip.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["clip-2.mp4"]


@pytest.mark.parametrize("name", ["clip.avi", "clip", "clip.mp4.avi"])
def test_another_ending(name, tmp_path):
    with pytest.raises(
        ValueError, match=r"must end in \.mp4, \.mov, \.mkv, \.webm, \.gif, \.webp, \.png, \.npy; say .*\.mp4"
    ):
        video().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "-y.mp4",
        "file: colon; and 'quotes' \"both\" %03d.mp4",
        "猫 🐈 \u00e9\u0301.mp4",
        " .mp4",
        "a\nb.mp4",
        "x" * 251 + ".mp4",
    ],
)
def test_any_name_that_the_system_allows(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in video().save(name)] == [name]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert read_recipe(name) == recipe()


def test_a_string_path_and_a_capital_ending(tmp_path):
    assert video().save(str(tmp_path / "clip.MP4")) == [tmp_path / "clip.MP4"]


# ---- writing fails ----


def broken_ffmpeg(tmp_path, script):
    path = tmp_path / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    "script",
    [
        "exit 1",  # dies while frames are sent
        'for last; do :; done; echo junk > "$last"; cat > /dev/null; exit 1',  # as on a full disk, at the end
        "cat > /dev/null; exit 0",  # writes nothing
    ],
)
def test_a_failed_write_leaves_no_file(script, tmp_path, monkeypatch):
    result = video()
    before = result.frames.copy()
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)  # the script also gets "-" as a file name
        patch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: broken_ffmpeg(tmp_path, script))
        with pytest.raises(OSError):
            result.save(out / "clip.mp4")
        assert not list(out.iterdir())
    assert np.array_equal(result.frames, before)
    result.save(out / "clip.mp4")
    assert len(read(out / "clip.mp4")[1]) == T, "the frames are still there to be saved"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            "head -c 9 > /dev/null; echo oh >&2; echo No space left >&2; exit 1",
            "ended with status 1, after: oh; No",
        ),
        ("head -c 9 > /dev/null; kill -9 $$", r"was killed by signal 9; is the disk full\?$"),
        ("cat > /dev/null; yes x | head -n 100000 >&2; exit 69", "ended with status 69, after: x; x; x$"),
    ],
)
def test_what_ffmpeg_said_is_told_in_one_line(script, told, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: broken_ffmpeg(tmp_path, script))
    with pytest.raises(OSError, match=rf"clip\.mp4 could not be written whole: ffmpeg {told}") as caught:
        video().save(tmp_path / "clip.mp4")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "clip.mp4").exists()


def _has_ended(process):
    return process.status() == psutil.STATUS_ZOMBIE


def test_an_encoder_that_is_killed_is_told(tmp_path):
    """While it encodes: the frames come from a stream that takes its time."""

    def frames():
        for i, frame in enumerate(video().as_uint8()[0]):
            if i == 3:
                (child,) = [c for c in psutil.Process().children() if "ffmpeg" in c.name()]
                child.kill()
                until(partial(_has_ended, child))
            yield np.repeat(frame, 20, 0)

    with pytest.raises(OSError, match=r"clip\.mp4 could not be written whole: ffmpeg was killed by signal 9"):
        write_encoded(frames(), tmp_path / "clip.mp4", FPS)
    assert not list(tmp_path.iterdir())
    assert not [child for child in psutil.Process().children() if "ffmpeg" in child.name()]


def test_a_failed_write_keeps_the_file_it_would_have_replaced(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_text("mine")
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: broken_ffmpeg(tmp_path, "exit 1"))
    with pytest.raises(OSError):
        video().save(tmp_path / "clip.mp4", overwrite=True)
    assert (tmp_path / "clip.mp4").read_text() == "mine"


def test_an_interrupted_write(tmp_path, monkeypatch):
    calls = []

    def interrupted(frame):
        calls.append(frame)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return frame

    monkeypatch.setattr(np, "ascontiguousarray", interrupted)
    with pytest.raises(KeyboardInterrupt):
        video().save(tmp_path / "clip.mp4")
    assert len(calls) == 3
    assert not list(tmp_path.iterdir())


# ---- frames of every type ----


def test_as_uint8():
    frames = video(2).frames
    expected = np.floor(frames * np.float32(255)).astype(np.uint8)
    as_tensor = torch.from_numpy(frames).permute(0, 1, 4, 2, 3)
    as_images = [[Image.fromarray(frame) for frame in clip] for clip in expected]
    for given in (frames, as_tensor, as_tensor.double(), as_images):
        arrays = WanVideo(frames=given, fps=FPS, recipe=recipe(2)).as_uint8()
        assert [a.dtype for a in arrays] == [np.uint8] * 2
        assert np.array_equal(np.stack(arrays), expected)


@pytest.mark.parametrize("latent_frames", [2, 3])  # 3 looks like colours
def test_latents_cannot_be_saved(latent_frames, tmp_path):
    latents = torch.zeros(1, 16, latent_frames, H // 8, W // 8)
    result = WanVideo(frames=latents, fps=FPS, recipe=recipe(num_frames=4 * latent_frames - 3))
    for write in (lambda: result.save(tmp_path / "a.mp4"), result.contact_sheet, result.as_uint8):
        with pytest.raises(ValueError, match=r"frames are latents.*pipe\.decode"):
            write()


def test_contact_sheet():
    sheet = video(2).contact_sheet(columns=5, cell_width=W, caption=False)
    assert sheet.size == (5 * (W + 4), 2 * (H + 4))
    array = np.asarray(sheet)
    frames = video(2).as_uint8()
    assert np.array_equal(array[2 : H + 2, 2 : W + 2], frames[0][0])
    assert np.array_equal(array[-H - 2 : -2, -W - 2 : -2], frames[1][T - 1])
    assert not array[:2].any()


def test_contact_sheet_of_a_short_video():
    assert video().contact_sheet(columns=20, cell_width=W, caption=False).size == (T * (W + 4), H + 4)
    assert video().contact_sheet(columns=1, cell_width=W, caption=False).size == (W + 4, H + 4)


def test_contact_sheet_scales_its_cells():
    large = np.asarray(video().contact_sheet(columns=1, cell_width=3 * W, caption=False))
    first = video().as_uint8()[0][0]
    assert np.array_equal(large[2:-2, 2:-2], first.repeat(3, axis=0).repeat(3, axis=1))
    assert video().contact_sheet(columns=1, cell_width=W // 2, caption=False).size == (
        W // 2 + 4,
        round(H / 2) + 4,
    )


def test_a_contact_sheet_says_what_it_shows():
    result = video(2)
    plain, told = result.contact_sheet(caption=False), result.contact_sheet()
    assert told.width == plain.width and told.height > plain.height + 60
    assert plain.height < result.contact_sheet(prompt=False).height < told.height
    assert np.array_equal(np.asarray(told)[-100:], np.asarray(plain)[-100:])


def test_writing_says_nothing(tmp_path, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        video().save(tmp_path / "clip.mp4")
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_an_output_is_also_a_dict_and_a_tuple():
    result = video()
    assert result["frames"] is result.frames is result[0]
    assert result.to_tuple()[1:] == (FPS, result.recipe)


# ---- equality ----


def test_equal_videos():
    """An array compared with another is an array, and no truth value."""
    mine, other = video(2), video(2)
    assert mine == other and hash(mine) == hash(other) and len({mine, other}) == 1
    as_tensor = WanVideo(
        frames=torch.from_numpy(mine.frames).permute(0, 1, 4, 2, 3), fps=FPS, recipe=recipe(2)
    )
    assert mine == as_tensor
    frames = mine.frames.copy()
    frames[1, -1, -1, -1, -1] += 0.01
    assert mine != WanVideo(frames=frames, fps=FPS, recipe=recipe(2))
    assert mine != WanVideo(frames=mine.frames, fps=FPS, recipe=recipe(2, guidance_scale=2.0))
    assert mine != WanVideo(frames=mine.frames, fps=FPS + 1, recipe=recipe(2))
    assert mine != video(1) and mine != "a video" and mine != mine.frames.tolist()
    latents = WanVideo(frames=torch.zeros(2, 16, 3, 6, 8), fps=FPS, recipe=recipe(2))
    assert (
        latents == WanVideo(frames=torch.zeros(2, 16, 3, 6, 8), fps=FPS, recipe=recipe(2)) and latents != mine
    )


# ---- what a file says ----


@pytest.mark.parametrize("ending", ["mp4", "gif", "webp", "png"])
def test_without_a_recipe(ending, tmp_path):
    path, *_ = video().save(tmp_path / f"clip.{ending}", recipe=False)
    assert b"wan22" not in path.read_bytes()
    with pytest.raises(ValueError, match="carries no recipe of wan22"):
        read_recipe(path)


def test_without_the_prompt(tmp_path):
    own = PRESETS[0].negative_prompt
    said = recipe(2, prompt=["a secret", "b"], negative_prompt=[own, "secret fog"])
    result = WanVideo(frames=video(2).frames, fps=FPS, recipe=said)
    paths = result.save(tmp_path / "clip.mp4", prompt=False)
    assert all(b"secret" not in path.read_bytes() for path in paths)
    assert [read_recipe(path).prompts for path in paths] == [(None,), (None,)]
    assert [read_recipe(path).negative_prompt for path in paths] == [[own], [None]]
    stream = WanStream(iter(video().as_uint8()[0]), FPS, said.of(0))
    (path,) = stream.save(tmp_path / "stream.png", prompt=False)[:1]
    assert b"secret" not in path.read_bytes() and read_recipe(path).seeds == (0,)


# ---- the other formats ----


def pillow(path):
    """Decode an animation with Pillow: (frames, milliseconds of each)."""
    with Image.open(path) as image:
        frames, durations = [], []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return np.stack(frames), durations


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_animations(ending, tmp_path):
    (path,) = video().save(tmp_path / f"clip.{ending}")
    frames, durations = pillow(path)
    assert frames.shape == (T, H, W, 3)
    assert sum(durations) == pytest.approx(1000 * T / FPS, abs=10), "frames of 83.3 ms take turns"
    assert np.abs(frames.astype(int) - video().as_uint8()[0]).mean() < 4


def test_png_files(tmp_path):
    paths = video().save(tmp_path / "clip.png")
    assert [path.name for path in paths] == [f"clip-{i:04d}.png" for i in range(1, T + 1)]
    assert np.array_equal(np.stack([np.asarray(Image.open(p)) for p in paths]), video().as_uint8()[0])
    with pytest.raises(FileExistsError, match=rf"clip-0001\.png and {T - 1} more exist"):
        video().save(tmp_path / "clip.png")
    assert len(video(2).save(tmp_path / "two.png")) == 2 * T


def test_png_files_of_an_earlier_video(tmp_path, caplog):
    (tmp_path / "clip-sheet.png").touch()
    video().save(tmp_path / "clip.png")
    assert not caplog.records
    later = [(tmp_path / f"clip-{i:04d}.png") for i in (T + 1, T + 2)]
    (tmp_path / "clip-0001.png").rename(later[0])
    (tmp_path / "clip-0002.png").rename(later[1])
    with pytest.raises(FileExistsError, match=rf"clip-0003\.png and {T - 1} more exist"):
        video().save(tmp_path / "clip.png")
    video().save(tmp_path / "clip.png", overwrite=True)
    assert f"clip-{T + 1:04d}.png and what follows it is not of this video" in caplog.text
    assert all(path.exists() for path in later), "nothing is removed"


def test_arrays_keep_their_values(tmp_path):
    (path,) = video().save(tmp_path / "clip.npy")
    assert np.array_equal(np.load(path), video().frames[0])
    assert np.load(path).dtype == np.float32


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv", "webm", "gif", "webp", "png"])
def test_the_recipe_travels(ending, tmp_path):
    prompts = ['a = b; #1 \\ "c"\n二', "e" * 5000]
    given = recipe(2, prompt=prompts, negative_prompt=["n", ""], versions={"wan22": "1"})
    files = WanVideo(frames=video(2).frames, fps=FPS, recipe=given).save(tmp_path / f"clip.{ending}")
    renamed = files[0].rename(tmp_path / "another name")
    assert read_recipe(renamed) == given.of(0)
    assert read_recipe(files[-1]) == given.of(1)
    assert read_recipe(files[-1]).prompts == ("e" * 5000,)


def test_files_without_a_recipe(tmp_path, written):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        read_recipe(tmp_path / "nowhere.mp4")
    plain = [tmp_path / name for name in ("a.png", "b.gif", "c.mp4", "d.txt")]
    for path in plain[:2]:
        Image.new("RGB", (4, 4)).save(path)
    write_encoded(video().as_uint8()[0], plain[2], FPS)
    plain[3].write_text("{}")
    for path in plain:
        with pytest.raises(ValueError, match="carries no recipe of wan22"):
            read_recipe(path)


def test_quality(tmp_path):
    noise = np.random.default_rng(0).random((1, T, H, W, 3), dtype=np.float32)
    result = WanVideo(frames=noise, fps=FPS, recipe=recipe())
    for ending in ("mp4", "webm", "webp"):
        sizes = [
            result.save(tmp_path / f"{q}.{ending}", quality=q)[0].stat().st_size for q in (10, 50, 90, 100)
        ]
        assert sizes == sorted(sizes) and sizes[-1] > 2 * sizes[0]
    result.save(tmp_path / "default.mp4")
    assert (tmp_path / "default.mp4").read_bytes() == (tmp_path / "90.mp4").read_bytes()
    (path,) = result.save(tmp_path / "crf.mp4", crf=16)
    assert path.read_bytes() == (tmp_path / "90.mp4").read_bytes()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("a.mp4", {"quality": 0}, "quality=0 must be an int, 1 to 100; the nearest is 1"),
        ("a.webp", {"quality": 101}, "the nearest is 100"),
        ("a.mp4", {"crf": 60}, "crf=60 must be an int, 0 to 51; the nearest is 51"),
        ("a.webm", {"crf": 64}, "crf=64 must be an int, 0 to 63; the nearest is 63"),
        ("a.mp4", {"crf": 1, "quality": 1}, "both given"),
        ("a.gif", {"quality": 5}, r"quality=5 is for \.mp4, .* and \.webp; \.gif has none"),
        ("a.webp", {"crf": 5}, r"crf=5 is for \.mp4, \.mov, \.mkv, \.webm, not \.webp"),
    ],
)
def test_qualities_that_there_are_not(name, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        video().save(tmp_path / name, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "npy"])
def test_a_full_disk(ending, tmp_path, monkeypatch):
    (tmp_path / "clip.npy").write_text("mine")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        OSError, match=r"clip.* could not be written whole(: No space left|; is the disk full)"
    ):
        video().save(tmp_path / f"clip.{ending}", overwrite=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("ending", ["mp4", "gif", "webp", "png", "npy"])
def test_a_file_that_appears_meanwhile_is_kept(ending, links, tmp_path, monkeypatch):
    """Another program's, or another run's of the same name; some file systems have no links."""
    name = "clip-0002.png" if ending == "png" else f"clip.{ending}"

    def frames():
        for i, frame in enumerate(video().as_uint8()[0]):
            if i == 1:
                (tmp_path / name).write_text("mine")
            yield frame

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(
        FileExistsError, match=rf"{name} exists: it appeared meanwhile; save under another name"
    ):
        writers.write(frames(), tmp_path / f"clip.{ending}", 8, replace=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}
    writers.write(frames(), tmp_path / f"clip.{ending}", 8)
    assert (tmp_path / name).read_bytes() != b"mine"


def test_files_can_be_read_by_others(tmp_path, monkeypatch):
    """As the process's umask says, which is not touched: another thread may make a file."""
    monkeypatch.setattr(os, "umask", None)
    (path,) = video().save(tmp_path / "clip.mp4")
    (tmp_path / "made").touch()
    assert path.stat().st_mode == (tmp_path / "made").stat().st_mode


# ---- notebooks, streams ----


def test_in_a_notebook_it_plays(tmp_path):
    html = video(2)._repr_html_()
    assert html.count("<video controls") == 2
    (tmp_path / "in.mp4").write_bytes(base64.b64decode(re.findall(r"base64,([^\"]+)", html)[1]))
    assert len(read(tmp_path / "in.mp4")[1]) == T
    assert read_recipe(tmp_path / "in.mp4") == recipe(2).of(1)
    latents = WanVideo(frames=torch.zeros(1, 16, 3, 6, 8), fps=FPS, recipe=recipe())
    assert "<video" not in latents._repr_html_()


def test_a_stream_is_written_as_it_comes(tmp_path):
    frames, alive = video().as_uint8()[0], []

    def source():
        for frame in frames:
            alive.append(len([1 for path in tmp_path.iterdir()]))
            yield frame

    stream = WanStream(source(), FPS, recipe())
    assert len(stream) == T
    assert stream.save(tmp_path / "clip.mp4") == [tmp_path / "clip.mp4"]
    assert alive[0] == 0 and alive[-1] == 1, "the file is being written while frames are made"
    assert np.abs(read(tmp_path / "clip.mp4")[1].astype(int) - frames).mean() < 4
    with pytest.raises(ValueError, match="no frames"):
        stream.save(tmp_path / "again.mp4")
    with pytest.raises(FileExistsError):
        WanStream(source(), FPS, recipe()).save(tmp_path / "clip.mp4")
