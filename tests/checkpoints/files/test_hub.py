"""Addresses of files on the hub, with a double in place of the download."""

from pathlib import Path

import pytest

from wan22.checkpoints.files import hub
from wan22.checkpoints.files.hub import HubFile, hub_file, local_file

SITE = "https://huggingface.co"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"{SITE}/city96/Wan-gguf/blob/main/q4.gguf", HubFile("city96/Wan-gguf", "q4.gguf", "main")),
        (f"{SITE}/a/b/resolve/v1/x/y.safetensors", HubFile("a/b", "x/y.safetensors", "v1")),
        (f"{SITE}/a/b/resolve/main/y.gguf?download=true#top", HubFile("a/b", "y.gguf", "main")),
        (f"{SITE}/a/b/blob/refs%2Fpr%2F3/y.pth", HubFile("a/b", "y.pth", "refs/pr/3")),
        (f"{SITE}/a/b/blob/refs/pr/3/y.pth", HubFile("a/b", "y.pth", "refs/pr/3")),
        (f"{SITE}/a/b/resolve/main/with%20space.gguf", HubFile("a/b", "with space.gguf", "main")),
        (f"{SITE}/a/b/file.safetensors", HubFile("a/b", "file.safetensors")),
        ("http://hf.co/a/b/raw/main/y.gguf", HubFile("a/b", "y.gguf", "main")),
        ("huggingface.co/a/b/blob/main/y.gguf", HubFile("a/b", "y.gguf", "main")),
        ("a/b/y.gguf", HubFile("a/b", "y.gguf")),
        ("a/b/x/y.safetensors", HubFile("a/b", "x/y.safetensors")),
        ("a/b/blob/main/y.gguf", HubFile("a/b", "y.gguf", "main")),
        ("a/b", None),
        ("a/b/c", None),
        ("b/y.gguf", None),
        ("y.gguf", None),
        ("", None),
        ("./a/b/y.gguf", None),
        ("/a/b/y.gguf", None),
        ("~/a/b/y.gguf", None),
        ("C:\\a\\b/c/y.gguf", None),
    ],
)
def test_addresses(source, expected):
    assert hub_file(source) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://civitai.com/api/download/models/1", r"not on huggingface\.co; download the file"),
        ("https://huggingface.co.evil.org/a/b/blob/main/x.gguf", r"not on huggingface\.co"),
        (f"{SITE}/a/b", "names no file of a repository"),
        (f"{SITE}/a/b/tree/main", "names no file of a repository"),
        (f"{SITE}/a/b/blob/main", "names no file of a repository"),
        ("https://x.org/" + "y" * 9000, r"^.{0,300}$"),
    ],
)
def test_other_urls_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        hub_file(source)


def test_an_address_is_downloaded_and_a_path_is_not(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args, **options: calls.append((args, options)) or "x")
    assert local_file(f"{SITE}/a/b/blob/v2/c/d.gguf", token="t", local_files_only=True) == Path("x")
    assert local_file("a/b/d.gguf", revision="v3") == Path("x")
    assert calls == [
        (("a/b", "c/d.gguf"), {"token": "t", "local_files_only": True, "revision": "v2"}),
        (("a/b", "d.gguf"), {"revision": "v3"}),
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/d.gguf").touch()
    assert local_file("a/b/d.gguf") == Path("a/b/d.gguf"), "what is here comes first"
    assert local_file("missing.gguf") == Path("missing.gguf")
    assert len(calls) == 2


def test_what_cannot_be_downloaded_is_named_in_one_line(tmp_path):
    options = {"cache_dir": tmp_path, "local_files_only": True}
    with pytest.raises(
        FileNotFoundError, match=r"^a/b/x/y\.gguf is not in the cache, and local_files_only=True forbids"
    ) as error:
        local_file("a/b/x/y.gguf", **options)
    assert "\n" not in str(error.value)
