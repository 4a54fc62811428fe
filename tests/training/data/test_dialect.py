"""TOML files as musubi-tuner has them."""

from pathlib import Path

import pytest

from wan22.training.data.config import DataConfig
from wan22.training.data.dialect import KEYS, read_toml
from wan22.training.data.items import read_configs

GENERAL = """
[general]
resolution = [960, 544]
caption_extension = ".caption"
batch_size = 1
enable_bucket = true
bucket_no_upscale = true
"""
DOCUMENTED = f"""{GENERAL}
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [1, 25, 45]
frame_extraction = "slide"
frame_stride = 10
source_fps = 30.0

[[datasets]]
image_jsonl_file = "/data/list.jsonl"
resolution = 512
enable_bucket = false
num_repeats = 4
"""


def read(text, tmp_path):
    (tmp_path / "data.toml").write_text(text, encoding="utf-8")
    return read_toml(tmp_path / "data.toml")


def test_a_file_of_that_program(tmp_path, caplog):
    configs, folder = read(DOCUMENTED, tmp_path)
    shared = {"caption_extension": ".caption", "upscale": False, "every_length": True}
    videos = DataConfig(
        str(tmp_path / "clips"),
        resolution=(960, 544),
        frames=(1, 25, 45),
        extraction="slide",
        stride=10,
        source_fps=30.0,
        only="videos",
        **shared,
    )
    images = DataConfig(
        "/data/list.jsonl", resolution=(512, 512), buckets=False, repeats=4, only="images", **shared
    )
    assert configs == [videos, images]
    assert folder == str(tmp_path / "cache")
    assert "batch_size is left out: the training has a batch size of its own" in caplog.text
    assert read_configs(tmp_path / "data.toml") == configs
    with pytest.raises(ValueError, match=r"data\.toml has its own settings; write frames, repeats there"):
        read_configs(tmp_path / "data.toml", repeats=2, frames=(5,))


def test_every_key_is_a_field():
    fields = DataConfig.__dataclass_fields__
    assert set(KEYS.values()) <= set(fields)
    assert len(set(KEYS.values())) == len(KEYS)


def test_folders_of_their_own_are_none_for_all(tmp_path):
    text = '[[datasets]]\nvideo_directory = "a"\ncache_directory = "b"\n'
    assert read(text, tmp_path)[1] == str(tmp_path / "b")
    assert read(text + text.replace('"b"', '"c"'), tmp_path)[1] is None


def test_a_path_is_looked_for_here_first(tmp_path, monkeypatch):
    (tmp_path / "there" / "clips").mkdir(parents=True)
    text = '[[datasets]]\nvideo_directory = "clips"\n'
    monkeypatch.chdir(tmp_path / "there")
    assert read(text, tmp_path)[0][0].source == "clips"
    monkeypatch.chdir("/")
    assert Path(read(text, tmp_path)[0][0].source) == tmp_path / "clips"


SET = '[[datasets]]\nvideo_directory = "a"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", "is not TOML: "),
        ("", r"has no \[\[datasets\]\]"),
        ("[dataset]", "dataset is not known; the nearest is datasets"),
        ("general = 3", r"must have a table \[general\]"),
        ("datasets = [3]", r"must have a table \[general\]"),
        ("[general]\nresolutions = 3\n" + SET, r"\[general\]: resolutions is not known; .* resolution$"),
        ("[general]\nvideo_directory = 'a'\n" + SET, r"video_directory belongs to \[\[datasets\]\]"),
        (
            SET + SET + "target_frame = [5]",
            "number 2: target_frame is not known; the nearest is target_frames",
        ),
        (SET + "control_directory = 'c'", "control_directory is not known; "),
        (SET + "image_directory = 'b'", "must have one of .* and has video_directory, image_directory"),
        ("[[datasets]]\nresolution = 5", "must have one of .*, and has none"),
        (SET + "resolution = [5]", r"number 1: resolution=\[5\] must be a width and a height"),
        (SET + "target_frames = [0]", "target_frames=0 must be an int"),
        (SET + "num_repeats = 0", "num_repeats=0 must be an int"),
        (SET + "frame_extraction = 'heads'", "frame_extraction='heads' must be one of"),
        (SET + "enable_bucket = 1", "enable_bucket=1 must be True or False"),
        (SET + "bucket_no_upscale = 1", "bucket_no_upscale=1 must be true or false"),
        ("[[datasets]]\nvideo_directory = 3", "video_directory=3 must be a path"),
    ],
)
def test_what_is_wrong(text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(text, tmp_path)
    assert "data.toml" in str(error.value) and len(str(error.value)) < 700
