"""Write the trained models as one checkpoint in the Diffusers layout.

    python examples/tiny/export.py --out runs/tiny --to wan22/assets/t2v

Reads runs/tiny/vae, base.pt, high.pt and low.pt, all written by the training scripts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from common import arguments, load
from diffusers import UniPCMultistepScheduler, __version__
from tokenizer import make_tokenizer
from train_t2v import BOUNDARY, SHIFT, TextToVideo

from wan22 import AutoencoderKLWan

MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": __version__,
    "boundary_ratio": BOUNDARY,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def export(source: Path, folder: Path, dtype: torch.dtype, vae_dtype: torch.dtype, shift: float) -> None:
    """Write a checkpoint folder, replacing one that is there.

    Args:
        source: folder of the training.
        folder: where the checkpoint goes.
        dtype: of the transformers' and the text encoder's weights.
        vae_dtype: of the autoencoder's weights.
        shift: of the noise schedule, for the scheduler's config.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    for expert, slot in (("high", "transformer"), ("low", "transformer_2")):
        model = TextToVideo(len(tokenizer))
        model.load_state_dict(load(source / f"{expert}.pt")["average"])
        model.transformer.to(dtype).save_pretrained(folder / slot)
    # The experts' training leaves the text encoder alone, so either file has the one to ship.
    model.to(dtype).text_encoder.save_pretrained(folder / "text_encoder")
    AutoencoderKLWan.from_pretrained(source / "vae").to(vae_dtype).save_pretrained(folder / "vae")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    ).save_pretrained(folder / "scheduler")
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # the training folder, nobody else's business
        path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    size = sum(path.stat().st_size for path in files)
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    options = arguments(__doc__, to="wan22/assets/t2v", dtype="bfloat16", vae_dtype="float16", shift=SHIFT)
    dtype, vae_dtype = getattr(torch, options.dtype), getattr(torch, options.vae_dtype)
    export(options.out, Path(options.to), dtype, vae_dtype, options.shift)
