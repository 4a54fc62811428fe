"""Clips in memory, in place of a folder of encoded ones."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from wan22 import tiny_checkpoint
from wan22.training.config import TrainConfig
from wan22.training.data.cached import CachedClips, CachedItem, Sample

SHAPES = {"t2v": (16, 5, 8, 8), "i2v": (16, 5, 8, 8), "ti2v": (48, 5, 8, 8)}


@dataclass(frozen=True)
class Clips(CachedClips):
    """Random clips, made anew from their numbers."""

    def read(self, index):
        """Return a clip."""
        random = torch.Generator().manual_seed(100 + index)
        shape, kind = self.items[index].shape, self.checkpoint["kind"]
        condition = torch.randn(20, *shape[1:], generator=random) if kind == "i2v" else None
        latents = torch.randn(shape, generator=random)
        return Sample(latents, condition, None, torch.randn(3 + index, 64, generator=random))


def clips_of(folder):
    """Return the clips of a folder named after kind and count, such as "t2v-5"."""
    kind, count = Path(folder).name.split("-")
    checkpoint = dict.fromkeys(("name", "vae", "text_encoder"), "tiny") | {"kind": kind}
    items = [
        CachedItem(Path(f"{kind}-{i}.safetensors"), SHAPES[kind], 1, f"caption {i}", f"clip {i}")
        for i in range(int(count))
    ]
    return Clips(Path(folder), checkpoint, items, torch.zeros(1, 64))


def settings(folder, kind="t2v", clips=5, **changes):
    """Return the settings of a short training in float32."""
    given = {"model": str(tiny_checkpoint(kind)), "data": f"{kind}-{clips}", "output": str(folder)}
    given |= {"steps": 4, "rank": 2, "batch_size": 2, "switch_every": 2, "save_every": 2, "dtype": "fp32"}
    given |= {"learning_rate": 1e-2, "device": "cpu", "caption_dropout": 0.3}
    return TrainConfig(**given | changes)


@pytest.fixture
def encoded(monkeypatch):
    """Let folders that are named "t2v-5" hold random clips."""
    monkeypatch.setattr(CachedClips, "open", staticmethod(clips_of))
