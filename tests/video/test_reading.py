"""Video files are read exactly: all frames, when they are shown, in which order, and what is no video."""

import os
from fractions import Fraction

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.videos import ffmpeg, frames_of, lossless
from wan22.video import reading
from wan22.video.reading import VideoFile, read_frames, scan
from wan22.video.writers import write_encoded


def constant(count, fps):
    """Return a video of constant rate, its times rounded to microseconds as ffmpeg rounds them."""
    times = tuple(round(Fraction(10**6 * i, 1) / fps) for i in range(count))
    return VideoFile("a.mp4", 64, 48, times, round(Fraction(10**6 * count, 1) / fps))


def expected(count, source, target):
    """Return the frames nearest to k/target, the earlier of two, one by one, in fractions."""
    wanted = max(1, int(Fraction(count, 1) / source * target + Fraction(1, 2)))
    numbers = []
    for k in range(wanted):
        distances = [abs(Fraction(i) / source - Fraction(k) / target) for i in range(count)]
        numbers.append(distances.index(min(distances)))
    return numbers


RATES = [8, 12, 16, 24, 25, 30, 50, 60, Fraction(30000, 1001), Fraction(24000, 1001)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.sampled_from(RATES), st.sampled_from([8, 16, 24]))
def test_resampling_takes_the_nearest_frame(count, source, target):
    video = constant(count, source)
    assert video.resampled(target) == expected(count, source, target)
    numbers = VideoFile("a", 1, 1, tuple(range(count)), count).resampled(target, source_fps=float(source))
    assert numbers == expected(count, source, target)
    assert video.resampled() == list(range(count))


@pytest.mark.parametrize("rate", [8, 16, 24])
def test_a_video_at_the_rate_stays_as_it_is(rate):
    assert constant(81, rate).resampled(rate) == list(range(81))


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".webm", ".mov"])
@pytest.mark.parametrize("fps", [16, 24, 30])
def test_times_in_files(ending, fps, tmp_path):
    """Containers round times; which frames are nearest is as without, but for ties that this decides."""
    frames = frames_of(fps + 1)
    write_encoded(iter(frames), tmp_path / f"a{ending}", fps)
    video = scan(tmp_path / f"a{ending}")
    assert (video.width, video.height, len(video.times)) == (64, 48, fps + 1)
    assert max(abs(t - 10**6 * i / fps) for i, t in enumerate(video.times)) <= 1000
    assert video.fps == pytest.approx(fps, rel=2e-3)
    numbers = video.resampled(16)
    assert len(numbers) == len(expected(fps + 1, fps, 16))
    off = [abs(Fraction(number, fps) - Fraction(k, 16)) for k, number in enumerate(numbers)]
    assert max(off) <= Fraction(1, 2 * fps) + Fraction(1, 1000)


def test_frames_are_exact(tmp_path):
    frames = frames_of(20)
    video = scan(lossless(tmp_path / "a.mkv", frames))
    assert np.array_equal(list(read_frames(video, range(20))), frames)
    numbers = [0, 0, 3, 4, 4, 4, 19]
    assert np.array_equal(list(read_frames(video, numbers)), frames[numbers])
    assert list(read_frames(video, [])) == []
    with pytest.raises(ValueError, match="has no frame 20; it has 20"):
        list(read_frames(video, [19, 20]))


def test_colours_are_those_that_were_written(tmp_path):
    frames = frames_of(5)
    write_encoded(iter(frames), tmp_path / "a.mp4", 8, crf=0)
    read = np.array(list(read_frames(scan(tmp_path / "a.mp4"), range(5))))
    assert np.abs(read.astype(int) - frames).mean() < 3


def test_a_variable_rate(tmp_path):
    """Frames 0 to 7, then every third."""
    kept = [0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 15, 18, 21]
    chosen = "select=lt(n\\,8)+not(mod(n\\,3))"
    lossless(tmp_path / "a.mkv", frames_of(24), 24, "-vf", chosen, "-fps_mode", "vfr")
    video = scan(tmp_path / "a.mkv")
    assert [round(time * 24 / 10**6) for time in video.times] == kept
    shown = [kept[number] for number in video.resampled(12)]
    assert shown[:4] == [0, 2, 4, 6] and all(abs(n - 2 * k) <= 1 for k, n in enumerate(shown))


def test_a_rotated_video_is_upright(tmp_path):
    frames = frames_of(3)
    write_encoded(iter(frames), tmp_path / "a.mp4", 8, crf=0)
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mp4")
    video = scan(tmp_path / "b.mp4")
    assert (video.width, video.height) == (48, 64)
    upright = np.array(list(read_frames(video, [0, 1, 2])))
    plain = np.array(list(read_frames(scan(tmp_path / "a.mp4"), [0, 1, 2])))
    assert np.abs(upright.astype(int) - np.rot90(plain, 1, axes=(1, 2))).mean() < 1


def test_reading_stops_with_the_last_frame_and_leaves_no_process(tmp_path):
    video = scan(lossless(tmp_path / "a.mkv", frames_of(50)))
    me = psutil.Process()
    before = set(me.children())
    stream = read_frames(video, range(50))
    next(stream)
    assert set(me.children()) - before
    stream.close()
    assert set(me.children()) == before
    assert len(list(read_frames(video, [2]))) == 1
    assert set(me.children()) == before


def test_a_file_that_changed(tmp_path):
    video = scan(lossless(tmp_path / "a.mkv", frames_of(9)))
    lossless(tmp_path / "a.mkv", frames_of(4))
    with pytest.raises(ValueError, match=r"a\.mkv has 4 frames now, and had 9"):
        list(read_frames(video, range(9)))


def test_what_is_no_video(tmp_path):
    write_encoded(iter(frames_of(30)), tmp_path / "a.mp4", 8)
    ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", "-movflags", "faststart", tmp_path / "fast.mp4")
    whole = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "headless.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:-900])
    (tmp_path / "junk.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path}/a.mp4\n")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", tmp_path / "sound.mp4")
    for name in ("cut", "headless", "junk", "empty", "list", "concat", "sound"):
        with pytest.raises(
            ValueError, match=rf"{name}\.mp4 (cannot be read whole|holds no video): "
        ) as error:
            scan(tmp_path / f"{name}.mp4")
        assert len(str(error.value)) < 800 and "0x5" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.mp4"):
        scan(tmp_path / "nothing.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("pipe.mp4", "."):
        with pytest.raises(ValueError, match="is no regular file"):
            scan(tmp_path / name)


def test_frames_that_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST_PIXELS", 64 * 47)
    with pytest.raises(ValueError, match="has frames of 64x48; 3008 pixels are the most"):
        scan(lossless(tmp_path / "a.mkv", frames_of(2)))


def test_a_name_that_ffmpeg_would_take_for_an_option_or_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lossless(tmp_path / "a.mkv", frames_of(2))
    for name in ("-i.mkv", "%03d.mkv", "a:b.mkv", "it's.mkv"):
        os.rename("a.mkv", name)
        assert len(scan(name).times) == 2
        os.rename(name, "a.mkv")
