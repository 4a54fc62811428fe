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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
    signed_distance,
)
from PIL import Image, ImageDraw, ImageFont

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


def judge(frames: np.ndarray) -> Verdict:
    """Read one clip.

    Args:
        frames: uint8 RGB, "t h w c".
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
        color=_nearest(np.median(pixels[core], axis=0), COLORS),
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


def _nearest(color: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
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
        scenes: what each clip should show.
        verdicts: what the judge read, in the same order.
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


def contact_sheet(
    clips: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str],
    columns: int = 6,
    zoom: int = 2,
    notes: Sequence[str] = (),
) -> Image.Image:
    """Lay clips out as rows: the caption on the left, then frames from first to last.

    Args:
        clips: uint8 RGB, "n t h w c".
        captions: a text per clip.
        columns: frames per clip, evenly spaced in time.
        zoom: enlargement, without smoothing.
        notes: an optional second text per clip, printed in red.
    Returns: the sheet.
    """
    h, w = (side * zoom for side in clips[0].shape[1:3])
    gap, text_width = 4, 176
    sheet = Image.new("RGB", (text_width + columns * (w + gap), len(clips) * (h + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (clip, text) in enumerate(zip(clips, captions, strict=True)):
        top = gap + row * (h + gap)
        lines = _wrap(text, pen, font, text_width - 2 * gap)
        pen.multiline_text((gap, top), "\n".join(lines), "black", font)
        if notes:
            below = top + 18 * len(lines) + gap
            note = _wrap(notes[row], pen, font, text_width - 2 * gap)
            pen.multiline_text((gap, below), "\n".join(note), (200, 0, 0), font)
        for column, t in enumerate(np.linspace(0, len(clip) - 1, columns).round().astype(int)):
            frame = Image.fromarray(clip[t]).resize((w, h), Image.Resampling.NEAREST)
            left = text_width + column * (w + gap)
            pen.rectangle((left - 1, top - 1, left + w, top + h), outline=(190, 190, 190))
            sheet.paste(frame, (left, top))
    return sheet


def _wrap(text: str, pen: ImageDraw.ImageDraw, font: Any, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def choose_scenes(
    n: int, seed: int = 0, split: str = "held_out", motions: Sequence[str] = CORE_MOTIONS
) -> list[Scene]:
    """Choose scenes, motion after motion in turn; none comes twice before all of its motion came once."""
    rng = np.random.default_rng(seed)
    groups = {m: [s for s in all_scenes(split) if s.motion == m] for m in motions}
    orders = {m: rng.permutation(len(group)) for m, group in groups.items()}
    turns = ((motions[i % len(motions)], i // len(motions)) for i in range(n))
    return [groups[m][orders[m][turn % len(orders[m])]] for m, turn in turns]


def generate(
    pipe: Any, prompts: Sequence[str], seed: int = 0, batch: int = 10, steps: int | None = None
) -> np.ndarray:
    """Make one video per prompt with the checkpoint's own recipe.

    Args:
        pipe: a wan22.WanT2VPipeline.
        prompts: one per video.
        seed: seed of the first batch; the next ones count on from it.
        batch: videos made at a time.
        steps: number of steps, if not the recipe's.
    Returns: uint8 videos, "n t h w c".
    """
    options = {} if steps is None else {"num_inference_steps": steps}
    videos = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        videos.append(np.stack(pipe(prompt=some, seed=seed + start, **options).as_uint8()))
        print(f"\r{start + len(some)}/{len(prompts)} videos", end="", flush=True)
    print()
    return np.concatenate(videos)


def _note(scene: Scene, verdict: Verdict) -> str:
    """Name what was read differently from what was asked for."""
    return ", ".join(v for k, v in vars(verdict).items() if k in vars(scene) and v != getattr(scene, k))


def main() -> None:
    """Judge a checkpoint; print the table, write scores.json and sheet.png."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", help="folder in the Diffusers layout; the embedded one by default")
    parser.add_argument("--prompts", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--motions", nargs="+", choices=(*MOTIONS, "all"), default=list(CORE_MOTIONS))
    parser.add_argument("--steps", type=int, help="number of steps, if not the recipe's")
    parser.add_argument("--batch", type=int, default=10, help="videos made at a time")
    parser.add_argument(
        "--no-prompt", action="store_true", help="give an empty prompt: must score near chance"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/judge"), help="folder for scores.json and sheet.png"
    )
    parser.add_argument("--rows", type=int, default=20, help="videos on the contact sheet")
    args = parser.parse_args()

    import torch

    import wan22

    path = args.checkpoint or wan22.tiny_checkpoint("t2v")
    pipe = wan22.WanT2VPipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scenes = choose_scenes(
        args.prompts, args.seed, args.split, MOTIONS if "all" in args.motions else args.motions
    )
    captions = [canonical(scene) for scene in scenes]
    started = time.perf_counter()
    prompts = [""] * len(captions) if args.no_prompt else captions
    videos = generate(pipe, prompts, args.seed, args.batch, args.steps)
    seconds = time.perf_counter() - started
    verdicts = [judge(video) for video in videos]
    scores = score(scenes, verdicts)
    print(f"{table(scores)}\n\n{seconds / len(videos):.2f} s a video")

    args.out.mkdir(parents=True, exist_ok=True)
    clips = [{"caption": c} | vars(v) for c, v in zip(captions, verdicts, strict=True)]
    report = {"split": args.split, "seed": args.seed, "no_prompt": args.no_prompt} | scores | {"clips": clips}
    (args.out / "scores.json").write_text(json.dumps(report, indent=1))
    notes = [_note(s, v) for s, v in zip(scenes, verdicts, strict=True)]
    contact_sheet(videos[: args.rows], captions[: args.rows], notes=notes[: args.rows]).save(
        args.out / "sheet.png"
    )
    print(f"{args.out / 'scores.json'}\n{args.out / 'sheet.png'}")


if __name__ == "__main__":
    main()
