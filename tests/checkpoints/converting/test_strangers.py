"""A source from a stranger: nothing beside the destination is written, nothing beside the source is read."""

import json
import shutil

import pytest

from tests.builders import random_pipeline
from wan22.checkpoints import convert


@pytest.fixture
def source(tmp_path):
    random_pipeline().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("name", ["../planted", "/tmp/planted", "a/../../planted", "scheduler/.", ".."])
def test_a_component_whose_name_leads_elsewhere(source, name, tmp_path):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "config.json").write_text("{}")
    index = source / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {name: ["somewhere", "Something"]}))
    with pytest.raises(
        ValueError, match=r"model_index.json lists .*; the name of a component must be an identifier"
    ):
        convert(source, tmp_path / "deep" / "er" / "out", to="diffusers")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "planted"}


@pytest.mark.parametrize("to", ["diffusers", "official"])
@pytest.mark.parametrize("place", ["tokenizer", "tokenizer/notes.txt", "tokenizer/more"])
def test_a_link_that_leads_out_of_the_source(source, place, to, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("secret")
    link = source / place
    if link.is_dir():
        shutil.move(link, private / "tokenizer")
        link.symlink_to(private / "tokenizer")
    else:
        link.symlink_to(private / "key" if link.suffix else private)
    with pytest.raises(
        ValueError, match=rf"{place} is a link to {private}.*, outside of {source}; put the file"
    ):
        convert(source, tmp_path / "out", to=to)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "private"}


def test_links_within_the_source_and_to_the_hubs_blobs(source, tmp_path):
    expected = (source / "tokenizer" / "tokenizer.json").read_text()
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0a1b"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    source.rename(snapshot)
    (snapshot / "tokenizer" / "tokenizer.json").rename(blobs / "f00d")
    (snapshot / "tokenizer" / "tokenizer.json").symlink_to(blobs / "f00d")
    (snapshot / "tokenizer" / "again.json").symlink_to("tokenizer.json")
    convert(snapshot, tmp_path / "out", to="diffusers")
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text() == expected
    assert not (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_symlink()
