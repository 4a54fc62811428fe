"""Why a download fails, in one line: no network, in offline mode, or because something is not there."""

import logging
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from wan22 import AutoencoderKLWan, FlowMatchUniPCScheduler, WanT2VPipeline, WanTransformer3DModel
from wan22.checkpoints.converting.convert import convert
from wan22.downloads import reaching
from wan22.pipelines.loading.single_files import load_tokenizer
from wan22.prompts import TransformersChat

NAME = "org/nothing"
LOADERS = {
    "pipeline": lambda **hub: WanT2VPipeline.from_pretrained(NAME, **hub),
    "transformer": lambda **hub: WanTransformer3DModel.from_pretrained(NAME, subfolder="transformer", **hub),
    "vae": lambda **hub: AutoencoderKLWan.from_pretrained(NAME, subfolder="vae", **hub),
    "scheduler": lambda **hub: FlowMatchUniPCScheduler.from_pretrained(NAME, subfolder="scheduler", **hub),
    "file": lambda **hub: WanTransformer3DModel.from_single_file(f"{NAME}/a.safetensors", **hub),
    "tokenizer": lambda **_: load_tokenizer(Path(NAME)),
    "converter": lambda **_: convert(NAME, "nowhere", "official"),
    "chat": lambda **_: TransformersChat(NAME),
}


@pytest.fixture
def no_network(monkeypatch):
    """No name is resolved, and nobody waits between attempts."""

    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.mark.parametrize("loader", LOADERS)
def test_without_a_network(loader, tmp_path, no_network, caplog, recwarn):
    with pytest.raises(FileNotFoundError) as error:
        LOADERS[loader](cache_dir=tmp_path)
    said = str(error.value)
    assert said.startswith(NAME) and "\n" not in said
    assert "is not in the cache, and the hub cannot be reached: " in said and "`wan22 models`" in said
    assert "Name or service not known" in said
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in warned] in ([], ["wan22.downloads"])
    assert not recwarn.list


@pytest.mark.parametrize("loader", LOADERS)
def test_in_offline_mode(loader, tmp_path, monkeypatch, caplog, recwarn):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="is not in the cache, and HF_HUB_OFFLINE=1 forbids"):
        LOADERS[loader](cache_dir=tmp_path)
    assert not caplog.records and not recwarn.list


def answer(cls, status=404):
    return cls("said\nat length", response=SimpleNamespace(headers={}, request=None, status_code=status))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (answer(errors.GatedRepoError, 403), "org/nothing is gated: ask for access"),
        (answer(errors.RepositoryNotFoundError), "the hub has no repository org/nothing"),
        (answer(errors.RevisionNotFoundError), "org/nothing has no revision v9"),
        (answer(errors.RemoteEntryNotFoundError), "org/nothing has no file a.json at revision v9"),
        (errors.HFValidationError("a\nb"), "no file or folder org/nothing, and a repository's name is like"),
        (OSError(28, "No space left on device"), "org/nothing/a.json cannot be downloaded: .* No space left"),
    ],
)
def test_other_reasons(error, said):
    with pytest.raises(FileNotFoundError, match=said) as told, reaching(NAME, "a.json", {"revision": "v9"}):
        raise error
    assert "\n" not in str(told.value)


def test_attempts_are_told_once(caplog):
    hub = logging.getLogger("huggingface_hub.utils._http")
    caplog.set_level(logging.WARNING, logger=hub.name)  # other tests silence it
    with reaching(NAME):
        for _ in range(3):
            hub.warning("'x' thrown while requesting HEAD https://huggingface.co")
            hub.warning("Retrying in 1s [Retry 1/5].")
        hub.warning("your token is old")
    names = [record.name for record in caplog.records]
    assert names == ["wan22.downloads", hub.name] and NAME in caplog.text
    hub.warning("Retrying in 1s [Retry 1/5].")
    assert len(caplog.records) == 3, "the library speaks for itself again"
