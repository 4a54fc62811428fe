"""Previews of a video while it is sampled, from the clean latents that each step predicts.

Shapes: b videos, c latent channels, t h w frames, rows, columns.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...checkpoints.loading.tiny_autoencoder import load_tiny_decoder
from ...checks import as_path, check_positive_int, cut, shown
from ...models.latent_rgb import latent_rgb_of, to_bytes
from ...models.tiny_autoencoder import TinyDecoder
from ...notebooks import in_notebook
from ...whole_files import whole_file
from .autoencoders import temporal_stride

logger = logging.getLogger(__name__)

PREVIEWS = 10  # of a run, about
SMALLEST, LARGEST = 256, 640  # pixels across: smaller pictures are enlarged, a decoder's larger ones reduced
ENDINGS = (".png", ".gif", ".webp")
FILE = "preview.png"  # what a run outside a notebook writes where no file is named


@dataclass(frozen=True, eq=False)
class Preview:
    """What a video looks like after a step."""

    step: int  # from 1
    num_steps: int
    label: str  # the expert's, "high noise" or "low noise"; "" if there is only one
    frames: np.ndarray  # uint8 "t h w 3": a pixel per latent cell, or decoded by a tiny autoencoder
    fps: float  # frames per second at which they play in the video's time

    @property
    def image(self) -> Image.Image:
        """The middle frame."""
        return enlarged(self.frames[len(self.frames) // 2])

    @property
    def images(self) -> list[Image.Image]:
        """All frames."""
        return [enlarged(frame) for frame in self.frames]


def enlarged(frame: np.ndarray) -> Image.Image:
    """Enlarge a small frame "h w 3" by a whole factor, so that its pixels stay crisp."""
    h, w, _ = frame.shape
    factor = max(1, -(-SMALLEST // w))
    return Image.fromarray(frame).resize((w * factor, h * factor), Image.Resampling.NEAREST)


Show = bool | str | os.PathLike[str] | Callable[[Preview], Any]


class Previewer:
    """Shows previews during one run, of the first video of a batch.

    Args:
        show: a function that takes each Preview; or a file that each of them replaces, .png for the middle
            frame, .gif or .webp for the video; or True: in a notebook one picture that changes in place,
            elsewhere the file preview.png in the working folder.
        vae: the pipeline's; its config tells the latents' colours.
        fps: frames per second of the video.
        every: steps from one preview to the next; None: about ten in a run. The last step always has one.
        decoder: a TinyDecoder, or its file (taew2_1, taew2_2): finer previews that take longer. None: a pixel
            per latent cell, which takes next to no time.
    """

    def __init__(
        self,
        show: Show,
        vae: Any,
        fps: float,
        every: int | None = None,
        decoder: TinyDecoder | str | Path | None = None,
    ) -> None:
        self.vae, self.fps = vae, fps
        self.every = None if every is None else check_positive_int("preview_every", every)
        self.show, self.place = _shower(show)  # the function, and the file that it writes, "" if none
        self._decoder = None if decoder is None else _check_decoder(decoder, vae)
        self._follows = self._decoder is not decoder  # a decoder of the caller's stays where it is
        self._colours = None if self._decoder else latent_rgb_of(vae)
        self._stopped = False

    def due(self, step: int, num_steps: int) -> bool:
        """Whether a step, counted from 1, is followed by a preview."""
        every = self.every or max(1, round(num_steps / PREVIEWS))
        return not self._stopped and (step % every == 0 or step == num_steps)

    @torch.no_grad()
    def step(self, step: int, num_steps: int, label: str, latents: torch.Tensor) -> None:
        """Show a preview of predicted clean latents "b c t h w" if one is due after this step (from 1).

        What a caller's function raises is raised; a file that cannot be written ends the previews alone.
        """
        if not self.due(step, num_steps):
            return
        frames, fps = self._frames(latents[0])
        try:
            self.show(Preview(step, num_steps, label, frames.cpu().numpy(), fps))
        except NotWrittenError as error:
            self._stopped, self.place = True, ""
            logger.warning("%s; the run goes on without previews", error)

    def _frames(self, z: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return uint8 frames "t h w 3" of latents "c t h w", and how many make a second."""
        if self._decoder is not None:
            try:
                return self._decode(self._decoder, z), self.fps
            except torch.OutOfMemoryError:
                logger.warning("there is no memory for the previews' decoder; they go on without it")
                self._decoder = None
        self._colours = self._colours or latent_rgb_of(self.vae)
        return self._colours.frames(z), self.fps / temporal_stride(self.vae)

    def _decode(self, decoder: TinyDecoder, z: torch.Tensor) -> torch.Tensor:
        if self._follows:
            decoder.to(z.device, torch.float32 if z.device.type == "cpu" else torch.float16)
        weight = next(decoder.parameters())
        pieces = []
        for piece in decoder.stream(z.to(weight.device, weight.dtype)):
            x = piece.transpose(0, 1)  # t 3 h w
            factor = -(-x.shape[3] // LARGEST)
            pieces.append(to_bytes(F.avg_pool2d(x, factor).float()).permute(0, 2, 3, 1).cpu())
        return torch.cat(pieces)


class NotWrittenError(Exception):
    """A preview's file could not be written."""


def _shower(show: Show) -> tuple[Callable[[Preview], Any], str]:
    """Return the function that shows previews as asked for, and the file that it writes, if any."""
    if callable(show):
        return show, ""
    if isinstance(show, str | os.PathLike):
        path = as_path(show).absolute()  # wherever the working folder is by then
        if path.suffix.lower() not in ENDINGS:
            nearest = ", ".join(path.with_suffix(ending).name for ending in ENDINGS)
            raise ValueError(f"{cut(path.name)} must end in {', '.join(ENDINGS)}, as {cut(nearest)}")
        return lambda preview: write(preview, path), str(show)
    if show is not True:
        rule = f"True, a function of a Preview, or a file ending in {', '.join(ENDINGS)}"
        raise ValueError(f"a preview cannot be shown by {shown(show)}; it must be {rule}")
    if in_notebook():
        return Display(), ""
    path = Path(FILE).absolute()
    return lambda preview: write(preview, path), FILE


def _check_decoder(decoder: TinyDecoder | str | Path, vae: Any) -> TinyDecoder:
    """Load a decoder if it is a file, and refuse one for other latents."""
    model = decoder if isinstance(decoder, TinyDecoder) else load_tiny_decoder(decoder)
    if model.latent_channels != vae.config.z_dim:
        raise ValueError(
            f"the previews' decoder takes {model.latent_channels} latent channels, the VAE has "
            f"{vae.config.z_dim}; taew2_1 takes 16, taew2_2 takes 48"
        )
    return model


class Display:
    """Shows previews in a notebook, each in the place of the one before."""

    def __init__(self) -> None:
        self.handle: Any = None

    def __call__(self, preview: Preview) -> None:
        """Show the middle frame."""
        if self.handle is None:
            from IPython.display import display

            self.handle = display(preview.image, display_id=True)
        else:
            self.handle.update(preview.image)


def write(preview: Preview, path: Path) -> None:
    """Replace a file by a preview at once: its middle frame in a .png, all frames in a .gif or .webp."""
    try:
        with whole_file(path) as partial:
            if path.suffix.lower() == ".png":
                preview.image.save(partial)
            else:
                first, *rest = preview.images
                milliseconds = round(1000 / preview.fps)
                first.save(partial, save_all=True, append_images=rest, duration=milliseconds, loop=0)
    except (OSError, KeyError) as error:  # KeyError: a Pillow that was built without WebP
        raise NotWrittenError(f"the preview {cut(path)} cannot be written: {cut(error)}") from error
