"""Write trained models as one checkpoint in the Diffusers layout.

    python examples/tiny/export.py --out runs/tiny --checkpoint i2v

Reads what the training scripts wrote; writes wan22/assets/<checkpoint>, or the folder `--to`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import arguments, load
from diffusers import UniPCMultistepScheduler, __version__
from tokenizer import make_tokenizer
from train_transformer import I2V_BOUNDARY, PARTS, T2V_BOUNDARY, VideoModel

from wan22 import AutoencoderKLWan

COMPONENTS = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


@dataclass(frozen=True)
class Checkpoint:
    """What makes up one checkpoint.

    Args:
        pipeline: diffusers' class for it.
        parts: parts of the training, by transformer slot.
        boundary_ratio: noise level at which the second transformer takes over; None for one transformer.
        expand_timesteps: whether the transformer takes one timestep per token.
        absent: components that the pipeline may have and this checkpoint does not.
    """

    pipeline: str
    parts: dict[str, str]
    boundary_ratio: float | None
    expand_timesteps: bool = False
    absent: tuple[str, ...] = ()

    @property
    def vae(self) -> str:
        """Name of the autoencoder."""
        return PARTS[self.parts["transformer"]].vae

    def index(self) -> dict[str, Any]:
        """Return the contents of model_index.json."""
        facts = {"_class_name": self.pipeline, "_diffusers_version": __version__}
        settings = {"boundary_ratio": self.boundary_ratio, "expand_timesteps": self.expand_timesteps}
        components = COMPONENTS | {name: [None, None] for name in self.absent}
        return facts | dict(sorted((settings | components).items()))


CHECKPOINTS = {
    "t2v": Checkpoint("WanPipeline", {"transformer": "high", "transformer_2": "low"}, T2V_BOUNDARY),
    "i2v": Checkpoint(
        "WanImageToVideoPipeline",
        {"transformer": "i2v-high", "transformer_2": "i2v-low"},
        I2V_BOUNDARY,
        absent=("image_encoder", "image_processor"),
    ),
    "ti2v": Checkpoint(
        "WanPipeline", {"transformer": "ti2v"}, None, expand_timesteps=True, absent=("transformer_2",)
    ),
}


def export(
    checkpoint: Checkpoint,
    source: Path,
    folder: Path,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    shift: float,
) -> None:
    """Write a checkpoint folder, replacing one that is there.

    Args:
        checkpoint: name of the checkpoint to write.
        source: folder of the training.
        folder: folder to write to.
        dtype: dtype of the transformers' and the text encoder's weights.
        vae_dtype: dtype of the autoencoder's weights.
        shift: shift of the noise schedule, for the scheduler's config.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer()
    parts: dict[str, Any] = {"tokenizer": tokenizer}
    for slot, part in checkpoint.parts.items():
        model = VideoModel(len(tokenizer), PARTS[part])
        model.load_state_dict(load(source / f"{part}.pt")["average"])
        model.to(dtype)
        # Only the base part trains the text encoder, so the last slot's is the one of all.
        parts |= {slot: model.transformer, "text_encoder": model.text_encoder}
    parts["vae"] = AutoencoderKLWan.from_pretrained(source / checkpoint.vae).to(vae_dtype)
    parts["scheduler"] = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # the training folder, nobody else's business
        path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(checkpoint.index(), indent=2) + "\n")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    size = sum(path.stat().st_size for path in files)
    print(f"{folder}: {size / 1e6:.1f} MB")


def main() -> None:
    """Export the checkpoint asked for."""
    names = {"checkpoint": "t2v", "to": ""}
    options = arguments(__doc__, **names, dtype="bfloat16", vae_dtype="float16", shift=3.0)
    checkpoint = CHECKPOINTS[options.checkpoint]
    dtype, vae_dtype = getattr(torch, options.dtype), getattr(torch, options.vae_dtype)
    folder = Path(options.to or f"wan22/assets/{options.checkpoint}")
    export(checkpoint, options.out, folder, dtype, vae_dtype, options.shift)


if __name__ == "__main__":
    main()
