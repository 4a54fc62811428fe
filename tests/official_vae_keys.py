"""Official VAE key names to ours, for reading the golden weights."""

import re

from torch import Tensor

# Official name of a part of a residual block, resampler or head, and ours; the same everywhere.
_PARTS = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
    "middle.0.": "mid_block.resnets.0.",
    "middle.1.": "mid_block.attentions.0.",
    "middle.2.": "mid_block.resnets.1.",
    "head.0.": "norm_out.",
    "head.2.": "conv_out.",
}


def vae_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename an official VAE state dict's keys to those of `AutoencoderKLWan`."""
    ours = {_rename(key, official): value for key, value in official.items()}
    assert len(ours) == len(official)
    return ours


def _rename(key: str, official: dict[str, Tensor]) -> str:
    """Rename one key."""
    if key.startswith(("conv1.", "conv2.")):
        return key.replace("conv1.", "quant_conv.").replace("conv2.", "post_quant_conv.")
    key = re.sub(r"^(encoder|decoder)\.conv1\.", r"\1.conv_in.", key)
    key = re.sub(r"^encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.", _nested_down, key)
    key = re.sub(r"^decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.", _nested_up, key)
    key = re.sub(r"^encoder\.downsamples\.", "encoder.down_blocks.", key)
    flat = re.match(r"^decoder\.upsamples\.(\d+)\.", key)
    if flat:
        key = _flat_up(int(flat[1]), official) + key[flat.end() :]
    for theirs, ours in _PARTS.items():
        key = key.replace(theirs, ours)
    return key


def _nested_down(match: re.Match[str]) -> str:
    """2.2 encoder: two residual blocks, then the downsampler."""
    block, layer = match.groups()
    inner = "downsampler" if layer == "2" else f"resnets.{layer}"
    return f"encoder.down_blocks.{block}.{inner}."


def _nested_up(match: re.Match[str]) -> str:
    """2.2 decoder: three residual blocks, then the upsampler."""
    block, layer = match.groups()
    inner = "upsampler" if layer == "3" else f"resnets.{layer}"
    return f"decoder.up_blocks.{block}.{inner}."


def _flat_up(index: int, official: dict[str, Tensor]) -> str:
    """2.1 decoder: three residual blocks and an upsampler for each resolution, in one flat list."""
    block, layer = divmod(index, 4)
    inner = (
        "upsamplers.0" if f"decoder.upsamples.{index}.resample.1.weight" in official else f"resnets.{layer}"
    )
    return f"decoder.up_blocks.{block}.{inner}."
