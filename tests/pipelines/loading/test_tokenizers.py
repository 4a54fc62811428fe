"""A tokenizer that would make every prompt the same is refused when it is loaded."""

import json

import pytest

from tests.builders import byte_tokenizer, load_pipeline, random_components, random_pipeline
from wan22.pipelines.loading.single_files import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    random_pipeline().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("kept", "message"),
    [(3, "knows no words: its vocabulary is not there"), (1, "cannot be used: Unk token")],
)
def test_without_its_vocabulary(folder, kept, message):
    path = folder / "tokenizer" / "tokenizer.json"
    table = json.loads(path.read_text())
    vocabulary = sorted(table["model"]["vocab"].items(), key=lambda entry: entry[1])
    table["model"]["vocab"] = dict(vocabulary[:kept])
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=rf"the tokenizer, .*tokenizer, {message}"):
        load_pipeline(folder)


def test_of_another_text_encoder(folder):
    tokenizer = byte_tokenizer()
    rows = random_components()["text_encoder"].config.vocab_size
    tokenizer.add_tokens([f"<{i}>" for i in range(rows)])
    with pytest.raises(ValueError, match=rf"has \d+ tokens, the text encoder {rows}; they are of different"):
        load_pipeline(folder, tokenizer=tokenizer)


def test_a_folder_without_a_vocabulary_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no vocabulary; it must hold tokenizer\.json or spiece"):
        load_tokenizer(tmp_path)
