"""Where LoRAs are: names with folders, other formats, PEFT's folders, repositories, addresses."""

import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from wan22.checkpoints.files.fingerprint import fingerprint
from wan22.checkpoints.lora import sources
from wan22.checkpoints.lora.sources import TABLE, LoraSource, lora_fingerprint, pair_in, read_source

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 7}


def where(weight_name=None, subfolder="", **hub):
    return LoraSource(weight_name, subfolder, hub)


def write(path):
    """A file whose only tensor has the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {path.name: torch.zeros(1)}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def read(source, where):
    (name,) = read_source(source, where).tensors
    return name


def stored(root, *names):
    for name in names:
        write(root / name)
    return root


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The hub's functions, for a repository org/loras whose files are in the returned folder."""
    root = tmp_path / "snapshot"

    def list_repo_files(repo, **hub):
        assert not hub
        assert repo == "org/loras"
        return [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]

    def download(repo, name, subfolder=None, **hub):
        assert repo == "org/loras"
        path = root / (subfolder or "") / name
        asked.append((str(path.relative_to(root)), hub))
        if not path.is_file():
            raise LocalEntryNotFoundError(f"{name} is not there\n" + "a long explanation " * 100)
        return str(path)

    asked = []
    monkeypatch.setattr(sources, "list_repo_files", list_repo_files)
    monkeypatch.setattr(sources, "hf_hub_download", download)
    return root, asked


def unreachable(monkeypatch):
    def fail(repo, **hub):
        raise OSError("no connection\n" + "x" * 10**5)

    monkeypatch.setattr(sources, "list_repo_files", fail)


def test_a_name_with_a_folder(tmp_path, repository):
    root, asked = repository
    for source in (
        str(stored(root, "four steps/v1/a.safetensors", "four steps/v1/b.safetensors")),
        "org/loras",
    ):
        assert read(source, where("four steps/v1/b.safetensors")) == "b.safetensors"
        assert read(source, where("v1/b.safetensors", "four steps")) == "b.safetensors"
        assert read(source, where("b.safetensors", "four steps/v1")) == "b.safetensors"
    assert asked == [("four steps/v1/b.safetensors", {})] * 3, "without a list of the repository's files"


def test_other_formats(tmp_path, repository):
    root, _ = repository
    stored(root, "a.bin", "b.pt", "c.safetensors", "notes.txt")
    for source in (root, "org/loras"):
        for name in ("a.bin", "b.pt"):
            assert read(source, where(name)) == name
        assert read(source, where()) == "c.safetensors", "the only safetensors file"
    (root / "c.safetensors").unlink()
    (root / "b.pt").unlink()
    for source in (root, "org/loras"):
        assert read(source, where()) == "a.bin"


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"])
def test_the_name_of_a_lora_among_others(name, repository):
    root, _ = repository
    stored(root, name, "optimizer.safetensors")
    for source in (root, "org/loras"):
        assert read(source, where()) == name


@pytest.mark.parametrize(
    ("name", "others", "counts"),
    [
        ("adapter_model.safetensors", ["x.safetensors"], True),
        ("adapter_model.bin", [], True),
        ("style.safetensors", [], True),
        ("style.safetensors", ["adapter_model.safetensors"], False),  # which it describes
    ],
)
def test_the_configuration_beside_the_weights(name, others, counts, repository):
    root, _ = repository
    stored(root / "sub", name, *others)
    (root / "sub" / "adapter_config.json").write_text("\ufeff" + json.dumps(CONFIG))
    asked = (
        (str(root / "sub" / name), where()),
        (root, where(name, "sub")),
        (root, where(f"sub/{name}")),
        ("org/loras", where(f"sub/{name}")),
        *([("org/loras", where(subfolder="sub"))] if counts else []),
        (f"https://huggingface.co/org/loras/blob/main/sub/{name}", where()),
    )
    for source, place in asked:
        assert read_source(source, place).metadata.get("adapter_config.json") == (CONFIG if counts else None)


def test_a_fingerprint_tells_configurations_apart(tmp_path):
    path = stored(tmp_path, "adapter_model.safetensors") / "adapter_model.safetensors"
    found = {lora_fingerprint(path)}
    for alpha in (7, 8):
        (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | {"lora_alpha": alpha}))
        found.add(lora_fingerprint(path))
    assert len(found) == 3
    assert all(mark.startswith(fingerprint(path)) for mark in found)


def test_a_damaged_configuration(tmp_path):
    stored(tmp_path, "adapter_model.safetensors")
    for text, said in (("{", "is no JSON"), ("[]", "is a list, no table")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"adapter_config\.json {said}"):
            read_source(tmp_path, where())


def test_addresses(repository):
    root, asked = repository
    stored(root, "a b/c.safetensors")
    for text, revision in (
        ("https://huggingface.co/org/loras/blob/main/a%20b/c.safetensors", "main"),
        ("https://huggingface.co/org/loras/resolve/v2/a%20b/c.safetensors?download=true", "v2"),
        ("org/loras/a b/c.safetensors", None),
    ):
        assert pair_in(text, where()) is None
        assert read(text, where(token="t")) == "c.safetensors"
        assert asked.pop() == (
            "a b/c.safetensors",
            {"token": "t"} | ({"revision": revision} if revision else {}),
        )
    with pytest.raises(ValueError, match=r"is not on huggingface\.co"):
        read("https://example.com/c.safetensors", where())


def test_pairs(repository):
    root, _ = repository
    names = [f"{noise}_noise_model.safetensors" for noise in ("high", "low")]
    stored(root, *(f"v1/{name}" for name in names), "v1/other.safetensors")
    for source in (root, "org/loras", "org/loras"):
        assert pair_in(source, where(subfolder="v1")) == tuple(root / "v1" / name for name in names)
        assert pair_in(source, where("v1/other.safetensors")) is None
        assert pair_in(source, where()) is None
    assert pair_in({}, where()) is None


def test_offline(repository, monkeypatch):
    root, asked = repository
    stored(root, "a.safetensors")
    monkeypatch.setattr(sources, "snapshot_download", lambda repo, local_files_only, **hub: str(root))
    unreachable(monkeypatch)
    for hub in ({"local_files_only": True}, {}):
        asked.clear()
        assert read("org/loras", where(None, None, **hub)) == "a.safetensors"
        assert asked[0] == ("a.safetensors", hub)


def test_what_is_not_there(repository):
    root, _ = repository
    stored(root, *(f"{c}.safetensors" for c in "abcdef"), "sub/x.bin")
    for source in (root, "org/loras"):
        for place, said in (
            (where("z.safetensors"), r"has no z\.safetensors; there is a\.safetensors, b.*, c.* and 3 more"),
            (where(), r"holds a\.safetensors, b.*, c.* and 3 more; give weight_name, one of them"),
            (where(subfolder="none"), r", none, holds no weight file$"),
            (where("x", "none"), r", none, has no x"),
        ):
            with pytest.raises(FileNotFoundError, match=said) as error:
                read_source(source, place)
            assert len(str(error.value)) < 200 + len(str(root))
    for name in "abcdef":
        (root / f"{name}.safetensors").unlink()
    for source in (root, "org/loras"):
        with pytest.raises(
            FileNotFoundError, match="holds no weight file; there are some in sub, to be given"
        ):
            read_source(source, where())


@pytest.mark.parametrize("text", ["data:text/plain," + "x" * 10**6, "x/" * 1000 + "y", "./none.safetensors"])
def test_what_can_be_no_lora(text):
    with pytest.raises(FileNotFoundError, match="there is no file") as error:
        read_source(text, where())
    assert len(str(error.value)) < 700


def test_a_repository_that_cannot_be_listed(monkeypatch):
    unreachable(monkeypatch)
    with pytest.raises(
        FileNotFoundError,
        match=r"org/none, nor can .* be listed: org/none is not in the cache, and HF_HUB_OFFLINE",
    ):
        read_source("org/none", where())


def test_a_table():
    file = read_source({"a": torch.zeros(1)}, where())
    assert (file.source, list(file.tensors)) == (TABLE, ["a"])
