"""Captioned clips drawn by rule: one coloured shape on a plain background, moving, resting or changing size.

They are what the embedded checkpoint learns from, and what its judge is tested against. Everything follows
from the random generator that is passed in, so a seed is a data set.

Axes: n clips, t frames, h w pixels, c channels (RGB). Lengths are pixels of a 64-pixel frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from types import MappingProxyType

import numpy as np

SIZE, FRAMES, FPS = 64, 17, 8

SHAPES = ("circle", "square", "triangle")
PALETTE = {
    "red": (225, 35, 35),
    "green": (25, 185, 60),
    "blue": (30, 60, 220),
    "yellow": (250, 215, 40),
    "white": (245, 245, 245),
    "purple": (190, 40, 210),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "orange": (250, 130, 20),  # of no checkpoint: see lora_clips.py
}
COLORS = {name: PALETTE[name] for name in ("red", "green", "blue", "yellow", "white", "purple")}
BACKGROUNDS = {name: PALETTE[name] for name in ("blue", "black", "white", "gray", "green")}

# Direction of travel as (x, y) in image coordinates: y points down.
DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
}
CORE_MOTIONS = ("left", "right", "up", "down", "still")
MOTIONS = (*DIRECTIONS, "growing", "shrinking")
MOTION_WEIGHTS = MappingProxyType({m: 1.0 if m in CORE_MOTIONS else 0.4 for m in MOTIONS})

RADIUS = (9.5, 13.0)  # half the extent of a shape that keeps its size
SMALL_RADIUS, LARGE_RADIUS = (5.5, 7.5), (13.5, 17.0)  # the two ends of growing and shrinking
TRAVEL, DIAGONAL_TRAVEL = (22.0, 30.0), (18.0, 26.0)  # way along each moving axis over the whole clip
MARGIN = 2.0  # a shape, with the soft tips of its corners, stays this far from the edge

_VERBS = {
    "left": ("moves to the left", "moves left", "slides to the left", "goes left", "is moving to the left"),
    "right": (
        "moves to the right",
        "moves right",
        "slides to the right",
        "goes right",
        "is moving to the right",
    ),
    "up": ("moves up", "moves upwards", "slides up", "goes up", "rises", "is moving up"),
    "down": ("moves down", "moves downwards", "slides down", "goes down", "falls", "is moving down"),
    "still": ("stays still", "does not move", "stands still", "rests", "is not moving"),
    "growing": ("grows", "gets bigger", "becomes larger", "is growing"),
    "shrinking": ("shrinks", "gets smaller", "becomes smaller", "is shrinking"),
} | {
    f"{v}-{h}": (f"moves up and to the {h}", f"moves diagonally up and {h}", f"goes up and {h}")
    if v == "up"
    else (f"moves down and to the {h}", f"moves diagonally down and {h}", f"goes down and {h}")
    for v, h in product(("up", "down"), ("left", "right"))
}
_SENTENCES = (
    "a {color} {shape} {verb} on a {background} background",
    "the {color} {shape} {verb} on a {background} background",
    "a {color} {shape} {verb} in front of a {background} background",
    "on a {background} background, a {color} {shape} {verb}",
    "{background} background, a {color} {shape} {verb}",
    "a {color} {shape} {verb} against a {background} backdrop",
)
_HELD_OUT_PAIRS = 3  # of the 27 colour pairs of each shape and motion


@dataclass(frozen=True)
class Scene:
    """What a clip shows, in the words of its caption."""

    shape: str
    color: str
    background: str
    motion: str


def all_scenes(split: str = "train") -> list[Scene]:
    """List every combination of one split, in a fixed order.

    Of the colour pairs of each shape and motion, the three whose hashes come first are held out: the same on
    every machine, and as many for one motion as for another.

    Args:
        split: "train" or "held_out"; each combination is in exactly one of them.
    Returns: scenes whose object and background colours differ.
    Raises: ValueError: unknown split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'held_out'")
    pairs = [(c, b) for c, b in product(COLORS, BACKGROUNDS) if c != b]
    scenes = []
    for shape, motion in product(SHAPES, MOTIONS):
        group = [Scene(shape, color, background, motion) for color, background in pairs]
        group.sort(
            key=lambda s: hashlib.sha256(f"{s.shape}/{s.color}/{s.background}/{s.motion}".encode()).digest()
        )
        scenes += group[:_HELD_OUT_PAIRS] if split == "held_out" else group[_HELD_OUT_PAIRS:]
    return scenes


def canonical(scene: Scene) -> str:
    """Return the standard caption, such as "a red circle moves to the right on a blue background"."""
    return _phrase(scene, _SENTENCES[0], _VERBS[scene.motion][0])


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return one of the many captions of a scene; every third one is the standard one."""
    if rng.random() < 1 / 3:
        return canonical(scene)
    verbs = _VERBS[scene.motion]
    return _phrase(scene, _SENTENCES[rng.integers(len(_SENTENCES))], verbs[rng.integers(len(verbs))])


def _phrase(scene: Scene, sentence: str, verb: str) -> str:
    return sentence.format(color=scene.color, shape=scene.shape, background=scene.background, verb=verb)


def path(motion: str, rng: np.random.Generator, frames: int = FRAMES) -> np.ndarray:
    """Draw a path for a 64-pixel frame: constant speed, and inside the frame all the way.

    Fewer than 17 frames are a window, at a random moment, of a 17-frame clip.

    Args:
        motion: one of MOTIONS.
        rng: source of size, way and start; the start is uniform over the places from which the way fits.
        frames: number of frames.
    Returns: centre x, centre y and radius in pixels, "t 3".
    """
    span = min(1.0, (frames - 1) / (FRAMES - 1))
    progress = rng.random() * (1 - span) + np.linspace(0.0, span, frames)
    radii: np.ndarray = np.full(2, rng.uniform(*RADIUS))
    if motion in ("growing", "shrinking"):
        radii = np.array([rng.uniform(*SMALL_RADIUS), rng.uniform(*LARGE_RADIUS)])
        radii = radii if motion == "growing" else radii[::-1]
    direction = np.array(DIRECTIONS.get(motion, (0, 0)))
    way = direction * rng.uniform(*(DIAGONAL_TRAVEL if direction.all() else TRAVEL))
    edge = radii.max() + MARGIN
    start = rng.uniform(edge - np.minimum(way, 0), SIZE - edge - np.maximum(way, 0))
    centre = start + progress[:, None] * way
    return np.column_stack([centre, radii[0] + progress * (radii[1] - radii[0])])


def draw(scene: Scene, rng: np.random.Generator, size: int = SIZE, frames: int = FRAMES) -> np.ndarray:
    """Draw one clip of a scene.

    Args:
        scene: the scene to draw.
        rng: source of everything the caption leaves open.
        size: height and width in pixels.
        frames: number of frames.
    Returns: uint8 frames, "t h w c".
    """
    return draw_track(scene, path(scene.motion, rng, frames), size)


def draw_track(scene: Scene, track: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Draw a scene's shape along a path, see `path`: uint8 frames, "t h w c"."""
    track = (track * (size / SIZE)).astype(np.float32)
    inside = np.clip(0.5 - signed_distance(scene.shape, track, size), 0, 1)  # one-pixel soft edge
    level = np.linspace(0, 1, 256)[:, None]
    ramp = (1 - level) * PALETTE[scene.background] + level * np.array(PALETTE[scene.color])
    # A table from coverage to colour is several times faster than blending every pixel in float.
    return np.rint(ramp).astype(np.uint8).take((inside * 255).astype(np.uint8), axis=0)


def signed_distance(shape: str, track: np.ndarray, size: int) -> np.ndarray:
    """Return each pixel's distance to the shape's outline, negative inside.

    Args:
        shape: one of SHAPES.
        track: centre x, centre y and radius in pixels, "t 3" float32.
        size: height and width in pixels.
    Returns: distances in pixels, "t h w" float32.
    Raises: ValueError: unknown shape.
    """
    pixel = np.arange(size, dtype=np.float32) + 0.5
    cx, cy, r = (column[:, None, None] for column in track.T)
    x, y = (
        np.abs(pixel[None, None, :] - cx),
        pixel[None, :, None] - cy,
    )  # all shapes are mirror-symmetric in x
    if shape == "circle":
        return np.sqrt(x * x + y * y) - r
    if shape == "square":
        return np.maximum(x, np.abs(y)) - 0.88 * r  # a smaller half side brings the area near the circle's
    if shape == "triangle":  # apex (0, -r), base from (-r, 0.75 r) to (r, 0.75 r)
        slope = np.float32(1.75)
        return np.maximum((slope * x - (y + r)) / np.sqrt(slope * slope + 1), y - 0.75 * r)
    raise ValueError(f"shape is {shape!r}; it must be one of {', '.join(SHAPES)}")


@lru_cache(maxsize=8)
def _scenes_by_motion(split: str) -> dict[str, list[Scene]]:
    scenes = all_scenes(split)
    return {m: [s for s in scenes if s.motion == m] for m in MOTIONS}


def sample_scenes(
    rng: np.random.Generator,
    n: int,
    split: str = "train",
    motions: Sequence[str] | None = None,
    weights: Mapping[str, float] = MOTION_WEIGHTS,
) -> list[Scene]:
    """Sample scenes of one split: first the motion by weight, then uniformly among its combinations.

    Args:
        rng: source of the choice.
        n: number of scenes.
        split: "train" or "held_out".
        motions: the motions to choose from; all by default.
        weights: relative frequency per motion.
    Returns: n scenes.
    """
    groups = _scenes_by_motion(split)
    names = list(motions or MOTIONS)
    p = np.array([weights[m] for m in names])
    chosen = rng.choice(len(names), size=n, p=p / p.sum())
    return [groups[names[i]][rng.integers(len(groups[names[i]]))] for i in chosen]


def draw_batch(
    rng: np.random.Generator,
    n: int,
    split: str = "train",
    motions: Sequence[str] | None = None,
    weights: Mapping[str, float] = MOTION_WEIGHTS,
    size: int = SIZE,
    frames: int = FRAMES,
) -> tuple[np.ndarray, list[str], list[Scene]]:
    """Draw clips of sampled scenes with their captions.

    Args:
        rng: source of scenes, captions and paths.
        n: number of clips.
        split: "train" or "held_out".
        motions: the motions to choose from; all by default.
        weights: relative frequency per motion.
        size: height and width in pixels.
        frames: number of frames; fewer than 17 are a window of a 17-frame clip, 1 is a still image.
    Returns: uint8 frames "n t h w c", captions, scenes.
    """
    scenes = sample_scenes(rng, n, split, motions, weights)
    frames_out = np.empty((n, frames, size, size, 3), np.uint8)
    for i, scene in enumerate(scenes):
        frames_out[i] = draw(scene, rng, size, frames)
    return frames_out, [caption(scene, rng) for scene in scenes], scenes
