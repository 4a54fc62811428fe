"""What all tests share: one thread, no network, small random pipelines."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["WAN22_CACHE"] = os.devnull  # nothing is prepared, unless a test has a cache of its own

import pytest
import torch
from diffusers.utils import logging as of_diffusers
from huggingface_hub.utils import are_progress_bars_disabled

from tests import builders
from wan22 import presets

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let a process run whole files, so that their fixtures are made once; and one of them all with ranks.

    Files are begun in the order in which they are collected.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "ranks" if file.startswith("tests/accel/parallel/") else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


# By pytest, and by PyTorch's compiler where it is first used.
SET_BY_OTHERS = ("PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_")


def state_of_the_process():
    """Return what tests that run later depend on."""
    return {
        "folder": os.getcwd(),
        "environment": {n: value for n, value in os.environ.items() if not n.startswith(SET_BY_OTHERS)},
        "disabled logging": logging.root.manager.disable,
        "wan22's logging level": logging.getLogger("wan22").level,
        "diffusers' bars": of_diffusers.is_progress_bar_enabled(),
        "the hub's bars": not are_progress_bars_disabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Fail a test that changes its process for those after it."""
    before = state_of_the_process()
    yield
    assert state_of_the_process() == before


@pytest.fixture
def tiny_preset(monkeypatch):
    """Let the random pipelines count as a released checkpoint with settings small enough to run."""
    preset = presets.Preset(
        name="random-t2v",
        repo="",
        dim=48,
        in_channels=16,
        boundary_ratio=0.875,
        num_inference_steps=3,
        flow_shift=5.0,
        guidance_scale=3.0,
        guidance_scale_2=2.0,
        width=48,
        height=32,
        num_frames=5,
        fps=12,
    )
    monkeypatch.setattr(presets, "PRESETS", (*presets.PRESETS, preset))
    return preset


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for prepared models."""
    monkeypatch.setenv("WAN22_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


@pytest.fixture
def bars_are_wanted(monkeypatch):
    """Let bars be drawn whatever the environment asks of the hub's library."""
    monkeypatch.setattr("diffusers.utils.logging.is_progress_bar_enabled", lambda: True)
    monkeypatch.setattr("huggingface_hub.utils.are_progress_bars_disabled", lambda: False)


@pytest.fixture
def pipe():
    """A random WanT2VPipeline of T2V-A14B's form."""
    return builders.random_pipeline()


@pytest.fixture
def single_pipe():
    """A random WanT2VPipeline with one transformer, of Wan 2.1's form."""
    return builders.random_pipeline(experts=1)


@pytest.fixture
def ti2v_pipe():
    """A random WanT2VPipeline of TI2V-5B's form."""
    return builders.random_pipeline(experts=1, channels=48)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder that a random pipeline was saved to, in float32."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    builders.random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_bf16(tmp_path_factory):
    """A folder as the hub's are: everything bf16 but the VAE."""
    folder = tmp_path_factory.mktemp("bf16")
    builders.bf16_pipeline().save_pretrained(folder)
    return folder
