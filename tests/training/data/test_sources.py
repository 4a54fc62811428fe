"""Which files a data set has, and their captions: folders, lists, and what is wrong with them."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.videos import frames_of
from wan22.training.data.buckets import Rules
from wan22.training.data.config import DataConfig
from wan22.training.data.items import find_items, read_configs
from wan22.training.data.sources import files_of
from wan22.video.writers import write_encoded

RULES = Rules("t2v", (16, 16), 4, 8, 17, (64, 64))


def picture(path, size=(64, 48)):
    Image.fromarray(np.zeros((*size[::-1], 3), np.uint8)).save(path)


def listed(source, **settings):
    return [(file.path.name, file.caption) for file in files_of(DataConfig(str(source), **settings))]


def test_a_folder(clips):
    picture(clips / "a.png")
    (clips / "a.txt").write_text("\ufeffred\nand blue", encoding="utf-8")
    (clips / "notes.md").touch()
    (clips / ".hidden.mp4").touch()
    wide, tall = ("wide.mp4", "a wide thing moves"), ("tall.mp4", "a tall thing moves")
    assert listed(clips) == [("a.png", "red\nand blue"), tall, wide]
    assert listed(clips, only="videos") == [tall, wide]
    assert listed(clips, only="images") == [("a.png", "red\nand blue")]
    (clips / "wide.caption").write_text("other")
    endings = listed(clips, caption_extension="caption", default_caption="any", only="videos")
    assert endings == [("tall.mp4", "any"), ("wide.mp4", "other")]
    assert listed(clips / "wide.mp4") == [wide]


@pytest.mark.parametrize("keys", [("video", "caption"), ("video_path", "caption"), ("file_name", "text")])
def test_a_list(clips, keys, tmp_path, monkeypatch):
    rows = [("wide.mp4", "one"), (str(clips / "tall.mp4"), "two"), ("wide.mp4", "three")]
    lines = [json.dumps(dict(zip(keys, row, strict=True)) | {"more": 1}) for row in rows]
    (clips / "metadata.jsonl").write_text("\n".join([*lines, ""]))
    expected = [("wide.mp4", "one"), ("tall.mp4", "two"), ("wide.mp4", "three")]
    assert listed(clips / "metadata.jsonl") == listed(clips) == expected
    (clips / "metadata.jsonl").rename(tmp_path / "list.jsonl")
    (tmp_path / "list.jsonl").write_text('{"image": "clips/wide.mp4"}')
    assert listed(tmp_path / "list.jsonl") == [("wide.mp4", "a wide thing moves")]  # of the text beside it
    monkeypatch.chdir(clips)
    (tmp_path / "list.jsonl").write_text('{"video": "wide.mp4", "caption": "here"}')
    assert listed("../list.jsonl") == [("wide.mp4", "here")]


def test_a_table(clips):
    (clips / "metadata.csv").write_text('video,prompt\nwide.mp4,"one, two"\ntall.mp4,"three\nlines"\n')
    assert listed(clips) == [("wide.mp4", "one, two"), ("tall.mp4", "three\nlines")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("\n[1]", "line 2 must be"),
        ('{"caption": "a"}', "names no file: one of video, image"),
        ('{"video": 3}', "video must be a text"),
        ('{"video": "wide.mp4", "image": "a.png"}', "has video and image, each of which would be a file"),
        ('{"video": "wide.xyz"}', r"wide\.xyz is no video or image by its ending"),
        ("", "holds no videos or images"),
        ("[" * 10**5, "line 1 is not JSON"),
    ],
)
def test_a_list_that_is_wrong(text, message, tmp_path):
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        listed(tmp_path / "list.jsonl")
    assert len(str(error.value)) < 900


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder or file"):
        listed(tmp_path / "nothing")
    (tmp_path / "a.doc").touch()
    with pytest.raises(ValueError, match=r"a\.doc is no data set: a folder, a \.jsonl"):
        listed(tmp_path / "a.doc")
    with pytest.raises(ValueError, match=r"holds no videos or images; it has \.doc, and .* are read"):
        listed(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"its folders \(train\) are data sets of their own"):
        listed(tmp_path)
    (tmp_path / "train" / "0.parquet").touch()
    with pytest.raises(ValueError, match=r"but \.parquet: write its files into a folder"):
        listed(tmp_path)
    (tmp_path / "list.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"list\.jsonl is not a text in UTF-8"):
        listed(tmp_path / "list.jsonl")


def test_all_files_are_looked_at_before_any_is_refused(clips, caplog):
    (clips / "wide.txt").unlink()
    (clips / "tall.txt").write_text(" \n")
    (clips / "junk.mp4").write_bytes(b"junk")
    picture(clips / "small.png", (8, 8))
    write_encoded(iter(frames_of(3)), clips / "short.mp4", 8)
    write_encoded(iter(frames_of(9)), clips / "fine.mp4", 8)
    for name in ("junk", "small", "short", "fine"):
        (clips / f"{name}.txt").write_text(name)
    config = DataConfig(str(clips), frames=(5,))
    with pytest.raises(ValueError, match=r"^5 of 6 files cannot be used: .*junk\.mp4.*; and 2 more$"):
        find_items(config, RULES)
    items = find_items(config, RULES, skip=True)
    assert [item.file.name for item in items] == ["fine.mp4"]
    for message in (
        "wide.mp4: there is no caption wide.txt; default_caption serves files without",
        "tall.mp4: tall.txt is empty",
        "short.mp4: it has 3 frames at 8 fps; the shortest clip has 5",
        "small.png",
        "junk.mp4 cannot be read whole",
    ):
        assert message in caplog.text
    (clips / "fine.txt").unlink()
    with pytest.raises(ValueError, match="there is nothing to train on in "):
        find_items(config, RULES, skip=True)


def test_a_picture_is_a_clip_of_one_frame_and_none_for_image_to_video(clips):
    picture(clips / "a.png")
    (clips / "a.txt").write_text("a")
    items = {item.file.name: item for item in find_items(DataConfig(str(clips)), RULES)}
    assert {name: item.frames for name, item in items.items()} == {"a.png": 1, "tall.mp4": 5, "wide.mp4": 9}
    assert items["a.png"].video is None and items["a.png"].numbers == (0,)
    rules = Rules("i2v", (16, 16), 4, 8, 17, (64, 64))
    with pytest.raises(ValueError, match=r"1 of 3 files .*a\.png: it is a picture; a clip for i2v goes on"):
        find_items(DataConfig(str(clips)), rules)
    with pytest.raises(ValueError, match=r"frames=\(1,\) has no length for i2v"):
        find_items(DataConfig(str(clips), frames=(1,), only="videos"), rules)


def test_frames_follow_the_rate_of_the_checkpoint(clips):
    rules = Rules("t2v", (16, 16), 4, 4, 17, (64, 64))
    videos = {"only": "videos", "frames": (5,)}
    by_name = {
        item.file.name: item for item in find_items(DataConfig(str(clips), **videos), rules, skip=True)
    }
    assert by_name["wide.mp4"].numbers == (0, 2, 4, 6, 8) and len(by_name) == 1
    kept = find_items(DataConfig(str(clips), keep_fps=True, **videos), rules)
    assert {item.numbers for item in kept} == {(0, 1, 2, 3, 4)}
    slow = find_items(DataConfig(str(clips), source_fps=4, **videos), rules)
    assert {item.numbers for item in slow} == {(0, 1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": (64,)}, r"resolution=\(64,\) must be a width and a height"),
        ({"resolution": (0, 64)}, "resolution=0 must be an int, at least 1"),
        ({"frames": (0,)}, "frames=0 must be an int"),
        ({"frames": "17"}, "frames='17' must be numbers of frames"),
        ({"extraction": "heads"}, "extraction='heads' must be one of .*; the nearest is 'head'"),
        ({"stride": 0}, "stride=0 must be"),
        ({"repeats": 1.5}, "repeats=1.5 must be"),
        ({"upscale": 1}, "upscale=1 must be True or False"),
        ({"source_fps": 0}, "source_fps=0 must be a number, above 0"),
        ({"source_fps": 24, "keep_fps": True}, "keep_fps and source_fps are given"),
        ({"caption_extension": "."}, r"caption_extension='\.' must be an ending"),
        ({"default_caption": 3}, "default_caption=3 must be a text"),
        ({"only": "video"}, "only='video' must be one of 'videos', 'images'; the nearest is 'videos'"),
    ],
)
def test_settings_that_are_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig("clips", **settings)


def test_configs_of_a_path_and_given_ones(clips):
    config = DataConfig(str(clips), frames=[9, 5, 9], resolution=64)
    assert config.frames == (5, 9) and config.resolution == (64, 64)
    assert read_configs(config) == read_configs([config]) == [config]
    assert read_configs(str(clips), frames=(5, 9), resolution=(64, 64)) == [config]
    with pytest.raises(ValueError, match="data must be a path with settings"):
        read_configs(config, repeats=2)
    with pytest.raises(FileNotFoundError):
        read_configs("nothing.toml")
    with pytest.raises(TypeError, match="a data set has no argument frame; the nearest is frames"):
        read_configs(clips, frame=5)
