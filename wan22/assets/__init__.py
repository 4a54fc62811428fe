"""The trained miniature checkpoints inside the package."""

from pathlib import Path

from ..checks import shown

_FOLDER = Path(__file__).parent


def tiny_checkpoint(name: str = "t2v") -> Path:
    """Return the folder of an embedded checkpoint, in the Diffusers layout.

    Args:
        name: "t2v", a miniature Wan2.2-T2V-A14B: two experts, umT5, a 4x8x8 VAE; 64 x 64 pixels, 17 frames.
            "i2v", an I2V-A14B with the same text encoder, tokenizer and VAE.
            "ti2v", a TI2V-5B: one transformer, a 4x16x16 VAE of the 2.2 kind; 128 x 128 pixels, 17 frames.

    Raises:
        ValueError: no checkpoint has this name.
    """
    names = sorted(folder.parent.name for folder in _FOLDER.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(f"there is no embedded checkpoint {shown(name)}; there is {', '.join(names)}")
    return _FOLDER / name
