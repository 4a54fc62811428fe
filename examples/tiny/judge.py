"""Read colour, background, motion, size change and shape out of decoded frames, and score a checkpoint.

    python examples/tiny/judge.py --prompts 100 --split held_out

Nothing is learned here: the rules below are plain measurements, tested on the generator's own clips.

Axes: t frames, h w pixels, c channels (RGB). Lengths are pixels of a 64-pixel frame, scaled with the height.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from clips import (
    BACKGROUNDS,
    COLORS,
    CORE_MOTIONS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    SIZE,
    Scene,
    all_scenes,
    canonical,
    draw,
    signed_distance,
)
from sheet import contact_sheet

NONE = "none"  # no object to speak of
UNCLEAR = "unclear"  # an object, but neither at rest nor on a straight, steady way
MIN_CONTRAST = 45.0  # RGB distance between object and background; the palette's closest pair is 127 apart
MIN_AREA = 24.0  # pixels; the smallest shape drawn has 53
MIN_SHARE = 0.6  # of everything that differs from the background, the largest piece holds this much
MIN_FRAMES = 0.75  # share of frames in which the object must be seen
STILL_BELOW, MOVES_FROM = 6.0, 12.0  # pixels over the clip; clips are drawn with 0 or with 22 and more
MAX_JITTER = (1.5, 0.1)  # pixels, plus a share of the way: deviation from a straight line at constant speed
GROWS_FROM = 1.4  # last radius over first; clips are drawn with 1 or with 1.8 and more
_AREAS = {"circle": np.pi, "square": 1.76**2, "triangle": 1.75}  # area at radius 1, see clips.signed_distance
_CENTROIDS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6}  # its centroid below the centre, in radii


@dataclass(frozen=True)
class Verdict:
    """What a clip shows, and the measurements behind it.

    `motion` is one of clips.MOTIONS, "unclear" or "none"; `size_change` is "growing", "shrinking", "constant"
    or "none". `travel` (x, y) and `jitter` are in pixels of a 64-pixel frame; `growth` is the last radius
    over the first; `overlap` is the intersection over union with the best-fitting shape; `seen` is the share
    of frames with an object.
    """

    color: str
    background: str
    motion: str
    shape: str
    size_change: str
    travel: tuple[float, float] = (0.0, 0.0)
    jitter: float = 0.0
    growth: float = 1.0
    overlap: float = 0.0
    seen: float = 0.0


def judge(frames: np.ndarray, colors: Mapping[str, tuple[int, int, int]] = COLORS) -> Verdict:
    """Read one clip.

    Args:
        frames: uint8 RGB, "t h w c".
        colors: the colours that the object may have.
    Returns: the verdict; every object attribute is "none" where no object is found.
    Raises: ValueError: frames of another type or shape.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; they must be uint8 't h w 3'")
    pixels = _blur(frames.astype(np.float32))
    ground = _border_color(pixels)
    background = _nearest(np.median(ground, axis=0), BACKGROUNDS)
    contrast = pixels - ground[:, None, None]
    strength = np.linalg.norm(contrast, axis=-1)
    peak = np.percentile(strength, 99)
    core = strength > 0.7 * peak
    tint = np.median(contrast[core], axis=0) if peak > 0 else np.zeros(3)
    length = float(np.linalg.norm(tint))
    nothing = Verdict(NONE, background, NONE, NONE, NONE)
    if length < MIN_CONTRAST:
        return nothing
    differs = contrast @ (tint / length**2) > 0.5
    piece = _largest_piece(differs)
    area = piece.sum((1, 2))
    scale = frames.shape[1] / SIZE
    seen = (area >= MIN_AREA * scale**2) & (area >= MIN_SHARE * (strength > 0.5 * length).sum((1, 2)))
    if seen.mean() < MIN_FRAMES:
        return nothing
    times = np.flatnonzero(seen) / (len(frames) - 1)
    piece, area = piece[seen], area[seen]
    centre = _centroids(piece)
    way, jitter = _straight_line(times, centre / scale)
    growth = _growth(times, np.sqrt(area))
    size_change = (
        "growing" if growth >= GROWS_FROM else "shrinking" if growth <= 1 / GROWS_FROM else "constant"
    )
    shape, overlap = _read_shape(piece, centre, area)
    return Verdict(
        color=_nearest(np.median(pixels[core], axis=0), colors),
        background=background,
        motion=_read_motion(way, jitter, size_change),
        shape=shape,
        size_change=size_change,
        travel=(round(float(way[0]), 1), round(float(way[1]), 1)),
        jitter=round(jitter, 2),
        growth=round(growth, 2),
        overlap=round(overlap, 3),
        seen=round(float(seen.mean()), 2),
    )


def _blur(x: np.ndarray) -> np.ndarray:
    """Average over 3 by 3 pixels, "t h w c"; noise falls to a third, edges stay where they are."""
    y = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    y = y[:, :-2] + y[:, 1:-1] + y[:, 2:]
    return (y[:, :, :-2] + y[:, :, 1:-1] + y[:, :, 2:]) / 9


def _border_color(pixels: np.ndarray) -> np.ndarray:
    """Return each frame's median colour along its edge, "t c"; an object covers at most a fifth of it."""
    w = max(2, pixels.shape[1] // 21)
    parts = (pixels[:, :w], pixels[:, -w:], pixels[:, :, :w], pixels[:, :, -w:])
    return np.median(np.concatenate([p.reshape(len(p), -1, 3) for p in parts], axis=1), axis=1)


def _nearest(color: np.ndarray, names: Mapping[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(color - np.array(names[name]))))


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    """Keep, in each frame, the connected piece around the densest place of the mask, "t h w" bool."""
    density = _blur(_blur(_blur(mask[..., None].astype(np.float32))))[..., 0] * mask
    piece = np.zeros_like(mask)
    peak = density.reshape(len(mask), -1).argmax(1)
    piece.reshape(len(mask), -1)[np.arange(len(mask)), peak] = True
    piece &= mask
    size = -1
    while size != (size := int(piece.sum())):
        for near, far in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :, 1:], np.s_[:, :, :-1])):
            piece[near] |= piece[far] & mask[near]
            piece[far] |= piece[near] & mask[far]
    return piece


def _centroids(mask: np.ndarray) -> np.ndarray:
    """Return centroid x and y per frame in pixels, "t 2"."""
    area = mask.sum((1, 2))
    x = (mask.sum(1) @ (np.arange(mask.shape[2]) + 0.5)) / area
    y = (mask.sum(2) @ (np.arange(mask.shape[1]) + 0.5)) / area
    return np.column_stack([x, y])


def _straight_line(times: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit constant speed; return the way from time 0 to 1, "2", and the RMS distance from that line."""
    basis = np.column_stack([np.ones_like(times), times])
    fit = np.linalg.lstsq(basis, centre, rcond=None)[0]
    residual = centre - basis @ fit
    return fit[1], float(np.sqrt((residual**2).sum(1).mean()))


def _growth(times: np.ndarray, radius: np.ndarray) -> float:
    slope, first = np.polyfit(times, radius, 1)
    return float(max(first + slope, 0.1) / max(first, 0.1))


def _read_motion(way: np.ndarray, jitter: float, size_change: str) -> str:
    distance = float(np.linalg.norm(way))
    if jitter > MAX_JITTER[0] + MAX_JITTER[1] * distance:
        return UNCLEAR
    if distance >= MOVES_FROM:  # the nearest of eight directions
        units = {m: np.array(d) / np.hypot(*d) for m, d in DIRECTIONS.items() if m != "still"}
        return max(units, key=lambda m: float(units[m] @ way))
    if size_change != "constant":
        return size_change
    return "still" if distance < STILL_BELOW else UNCLEAR


def _read_shape(piece: np.ndarray, centre: np.ndarray, area: np.ndarray) -> tuple[str, float]:
    """Compare with each shape at the same area and centroid; return the best and its overlap."""
    overlap = {}
    for shape in SHAPES:
        radius = np.sqrt(area / _AREAS[shape])
        track = np.column_stack([centre[:, 0], centre[:, 1] - _CENTROIDS[shape] * radius, radius])
        template = signed_distance(shape, track.astype(np.float32), piece.shape[1]) < 0
        overlap[shape] = float(((piece & template).sum((1, 2)) / (piece | template).sum((1, 2))).mean())
    best = max(overlap, key=lambda s: overlap[s])
    return best, overlap[best]


def score(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Compare verdicts with what was asked for.

    Args:
        scenes: the scene that each clip should show.
        verdicts: the judge's readings, in the same order.
    Returns: "n"; accuracy from 0 to 1 for color, background, shape, motion, size_change, and "all" of them at
        once; "per_motion": n, accuracy and what was read, for each motion asked for.
    Raises: ValueError: different lengths, or none.
    """
    if len(scenes) != len(verdicts) or not scenes:
        raise ValueError(
            f"{len(scenes)} scenes and {len(verdicts)} verdicts; both must be equal and at least 1"
        )
    right = {
        "color": [s.color == v.color for s, v in zip(scenes, verdicts, strict=True)],
        "background": [s.background == v.background for s, v in zip(scenes, verdicts, strict=True)],
        "shape": [s.shape == v.shape for s, v in zip(scenes, verdicts, strict=True)],
        "motion": [s.motion == v.motion for s, v in zip(scenes, verdicts, strict=True)],
        "size_change": [_size_change(s) == v.size_change for s, v in zip(scenes, verdicts, strict=True)],
    }
    per_motion = {}
    for motion in MOTIONS:
        read = Counter(v.motion for s, v in zip(scenes, verdicts, strict=True) if s.motion == motion)
        if n := read.total():
            per_motion[motion] = {"n": n, "accuracy": read[motion] / n, "read_as": dict(read.most_common())}
    accuracy = {name: float(np.mean(hits)) for name, hits in right.items()}
    every = float(np.mean(np.all(list(right.values()), axis=0)))
    return {"n": len(scenes), **accuracy, "all": every, "per_motion": per_motion}


def _size_change(scene: Scene) -> str:
    return scene.motion if scene.motion in ("growing", "shrinking") else "constant"


def table(scores: dict[str, Any]) -> str:
    """Return the scores as lines of text."""
    names = ("color", "background", "motion", "size_change", "shape", "all")
    lines = [f"{'clips':<12} {scores['n']:>6}", *(f"{name:<12} {scores[name]:>6.1%}" for name in names), ""]
    for motion, row in scores["per_motion"].items():
        wrong = ", ".join(f"{k} {v}" for k, v in row["read_as"].items() if k != motion)
        lines.append(
            f"{motion:<12} {row['accuracy']:>6.1%} of {row['n']:<4} {wrong and 'else: ' + wrong}".rstrip()
        )
    return "\n".join(lines)


def choose_scenes(
    n: int, seed: int = 0, split: str = "held_out", motions: Sequence[str] = CORE_MOTIONS
) -> list[Scene]:
    """Choose scenes, motion after motion in turn; none comes twice before all of its motion came once."""
    rng = np.random.default_rng(seed)
    groups = {m: [s for s in all_scenes(split) if s.motion == m] for m in motions}
    orders = {m: rng.permutation(len(group)) for m, group in groups.items()}
    turns = ((motions[i % len(motions)], i // len(motions)) for i in range(n))
    return [groups[m][orders[m][turn % len(orders[m])]] for m, turn in turns]


def given_frames(scenes: Sequence[Scene], seed: int, size: int, last: bool) -> dict[str, np.ndarray]:
    """Draw a clip of each scene and return the frames that image to video is given of it.

    Args:
        scenes: the scenes of the clips.
        seed: seed of the clips.
        size: height and width in pixels.
        last: whether the last frame is given, too.
    Returns: "image" and, with last, "last_image": uint8, "n h w c".
    """
    rng = np.random.default_rng(seed)
    videos = np.stack([draw(scene, rng, size) for scene in scenes])
    return {"image": videos[:, 0]} | ({"last_image": videos[:, -1]} if last else {})


def psnr(frames: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Return each frame's PSNR in dB to the one given, "n", of uint8 "n h w c"; 54 where they are equal."""
    square = (frames.astype(np.float64) - given).reshape(len(given), -1) ** 2
    return 10 * np.log10(255**2 / np.maximum(square.mean(axis=1), 0.25))  # half a step of the 8 bits


def fidelity(videos: np.ndarray, given: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return how well videos "n t h w c" keep the given frames: for each kind mean and lowest PSNR in dB."""
    places = {"image": 0, "last_image": -1}
    values = {name: psnr(videos[:, places[name]], frames) for name, frames in given.items()}
    return {name: {"mean": float(v.mean()), "lowest": float(v.min())} for name, v in values.items()}


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seed: int = 0,
    batch: int = 10,
    steps: int | None = None,
    given: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> np.ndarray:
    """Make one video per prompt with the checkpoint's own recipe.

    Args:
        pipe: a wan22.WanT2VPipeline or wan22.WanI2VPipeline.
        prompts: one per video.
        seed: seed of the first batch; the next ones count on from it.
        batch: videos made at a time.
        steps: number of steps, if not the recipe's.
        given: frames that the videos start from, see given_frames; none for text to video.
    Returns: uint8 videos, "n t h w c".
    """
    options = {} if steps is None else {"num_inference_steps": steps}
    videos = []
    for start in range(0, len(prompts), batch):
        chosen = slice(start, start + batch)
        images = {name: frames[chosen] for name, frames in given.items()}
        made = pipe(prompt=list(prompts[chosen]), seed=seed + start, **images, **options)
        videos.append(np.stack(made.as_uint8()))
        print(f"\r{start + len(videos[-1])}/{len(prompts)} videos", end="", flush=True)
    print()
    return np.concatenate(videos)


def _note(scene: Scene, verdict: Verdict) -> str:
    """Name what was read differently from what was asked for."""
    return ", ".join(v for k, v in vars(verdict).items() if k in vars(scene) and v != getattr(scene, k))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add = parser.add_argument
    add("--checkpoint", help="folder in the Diffusers layout; the task's embedded one by default")
    add("--task", choices=("t2v", "i2v"), default="t2v", help="text to video, or image and text to video")
    add("--last", action="store_true", help="give the last frame, too (--task i2v)")
    add("--prompts", type=int, default=100, help="how many")
    add("--seed", type=int, default=0)
    add("--split", choices=("held_out", "train"), default="held_out")
    add("--motions", nargs="+", choices=(*MOTIONS, "all"), default=list(CORE_MOTIONS))
    add("--steps", type=int, help="number of steps, if not the recipe's")
    add("--batch", type=int, default=10, help="videos made at a time")
    add("--threads", type=int, help="CPU threads; all by default")
    add("--no-prompt", action="store_true", help="give an empty prompt: must score near chance")
    add("--out", type=Path, default=Path("outputs/judge"), help="folder for scores.json and sheet.png")
    add("--rows", type=int, default=20, help="videos on the contact sheet")
    args = parser.parse_args()
    if args.last and args.task != "i2v":
        parser.error("--last needs --task i2v")
    return args


def main() -> None:
    """Judge a checkpoint; print the table, write scores.json and sheet.png."""
    args = parse()

    import torch

    import wan22

    if args.threads:
        torch.set_num_threads(args.threads)
    pipeline = wan22.WanT2VPipeline if args.task == "t2v" else wan22.WanI2VPipeline
    path = args.checkpoint or wan22.tiny_checkpoint(args.task)
    pipe = pipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    motions = MOTIONS if "all" in args.motions else args.motions
    scenes = choose_scenes(args.prompts, args.seed, args.split, motions)
    captions = [canonical(scene) for scene in scenes]
    given = given_frames(scenes, args.seed, pipe.preset.height, args.last) if args.task == "i2v" else {}
    started = time.perf_counter()
    prompts = [""] * len(captions) if args.no_prompt else captions
    videos = generate(pipe, prompts, args.seed, args.batch, args.steps, given)
    seconds = time.perf_counter() - started
    verdicts = [judge(video) for video in videos]
    scores = score(scenes, verdicts) | {"given": fidelity(videos, given)}
    print(table(scores))
    for name, values in scores["given"].items():
        print(f"{name:<12} {values['mean']:>6.1f} dB on average, lowest {values['lowest']:.1f} dB")
    print(f"\n{seconds / len(videos):.2f} s a video")

    args.out.mkdir(parents=True, exist_ok=True)
    clips = [{"caption": c} | vars(v) for c, v in zip(captions, verdicts, strict=True)]
    report = {"split": args.split, "seed": args.seed, "no_prompt": args.no_prompt} | scores | {"clips": clips}
    (args.out / "scores.json").write_text(json.dumps(report, indent=1))
    notes = [_note(s, v) for s, v in zip(scenes, verdicts, strict=True)]
    sheet = contact_sheet(videos[: args.rows], captions[: args.rows], notes=notes[: args.rows])
    sheet.save(args.out / "sheet.png")
    print(f"{args.out / 'scores.json'}\n{args.out / 'sheet.png'}")


if __name__ == "__main__":
    main()
