"""What each way to compute less costs: passes saved, time, and distance to the exact video of the same seed.

    python -m tests.bench.quality [--miniature i2v] [--prompts 100] [--only NAME …] [--json FILE] [--plot F]
    python -m tests.bench.quality --checkpoint Wan-AI/Wan2.2-T2V-A14B-Diffusers --prompt-file prompts.txt

Each video is made exactly and by each setting, with one seed, and compared frame by frame. The miniature's
videos are also judged: whether colour, background, motion and shape are those of the prompt. Rows are medians
over the prompts. With --json a run that was cut goes on where it was.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.harness import Row, machine
from wan22 import WanI2VPipeline, WanT2VPipeline, tiny_checkpoint
from wan22.accel.planning.costs import forward_flops

TINY = Path(__file__).parents[2] / "examples" / "tiny"
EXACT = "exact"
CACHES = {
    f"cache={method}:{level}": {"cache": f"{method}:{level}"}
    for method in ("easy", "mag", "taylor")
    for level in ("low", "medium", "high")
}
GUIDANCE = {
    "guidance=gated": {"guidance": "gated"},
    "guidance_interval=(0, 0.7)": {"guidance_interval": (0, 0.7)},
}
ATTENTION = {"attention=radial": {"attention": {"method": "radial"}}}
STACKS = {
    f"{cache} + gated": {"cache": cache, "guidance": "gated"}
    for cache in ("easy:low", "easy:medium", "mag:low", "taylor:low", "taylor:medium")
}
QUANTIZED = {f"quantize={text}": {"quantize": text} for text in ("fp8", "fp8:low", "fp8:keep=1", "int8")}
FEWER = {f"{percent} % of the steps": {"steps": percent / 100} for percent in (75, 50, 35)}
# A miniature's frame has 4 x 4 tokens, and 3 x 3 at 0.75.
FEWER_TOKENS = {
    f"resolution_schedule={name}": {"resolution_schedule": name} for name in ("coarse-to-fine", "u")
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    EXACT: {},
    **FEWER,
    **GUIDANCE,
    **CACHES,
    **ATTENTION,
    **STACKS,
    **QUANTIZED,
    **FEWER_TOKENS,
}
# The miniatures' tasks: pipeline, and whether videos start from an image.
MINIATURES = {
    "t2v": (WanT2VPipeline, "t2v", False),
    "i2v": (WanI2VPipeline, "i2v", True),
    "ti2v": (WanT2VPipeline, "ti2v", False),
    "ti2v-image": (WanI2VPipeline, "ti2v", True),
}
# What is read in a miniature's videos, each a share of all.
JUDGED = ("color", "background", "motion", "shape")


@dataclass
class Measured:
    """A setting's videos, one value for each prompt."""

    passes: list[float] = field(default_factory=list)  # by their arithmetic, in those at full size
    seconds: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)


def compare(frames: np.ndarray, exact: np.ndarray) -> tuple[float, float, float]:
    """Return PSNR in dB, SSIM, and 1 - MS-SSIM of two videos "t h w c" in uint8.

    MS-SSIM over three scales takes the place of a learned distance, which would need weights of its own.
    """
    from torchmetrics.functional import image as metrics

    found, wanted = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (frames, exact))
    error = (found - wanted).square().mean().item()
    psnr = -10 * float(np.log10(max(error, 0.25 / 255**2)))  # at most half a step of the 8 bits
    weights, of_scales = (0.3, 0.4, 0.3), metrics.multiscale_structural_similarity_index_measure
    return (
        psnr,
        float(metrics.structural_similarity_index_measure(found, wanted, data_range=1.0)),
        1 - float(of_scales(found, wanted, data_range=1.0, betas=weights)),
    )


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """List the tokens of each pass in which blocks run."""
    tokens, handles = list[int](), []

    def add(block: Any, arguments: Any) -> None:
        tokens.append(arguments[0].shape[1])

    for model in pipe.transformers:
        handles.append(model.blocks[0].register_forward_pre_hook(add))
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quantized(pipe: Any, text: str | None) -> Iterator[None]:
    """Have the pipeline's transformers quantised for a while: copies of them."""
    models = {} if text is None else {slot: getattr(pipe, slot) for slot in ("transformer", "transformer_2")}
    for slot, model in models.items():
        setattr(pipe, slot, copy.deepcopy(model))
    try:
        if text is not None:
            pipe.quantize(text)
        yield
    finally:
        for slot, model in models.items():
            setattr(pipe, slot, model)


def make(
    pipe: Any, setting: Mapping[str, Any], prompt: Mapping[str, Any], seed: int
) -> tuple[np.ndarray, float, float]:
    """Return a video in uint8, the passes that were computed, and its seconds, on a CPU those of its core.

    A pass of fewer tokens counts as the share of a whole one's arithmetic that it has.
    """
    arguments = dict(setting)
    if (share := arguments.pop("steps", None)) is not None:
        arguments["num_inference_steps"] = round(share * pipe.preset.num_inference_steps)
    if arguments.get("attention") and pipe.released is not None and not pipe.released.repo:
        # One block of 128 tokens would hold a miniature's video, and leave out nothing.
        arguments["attention"] = {**arguments["attention"], "block": 2}
    # CPU seconds, for exact videos and others are made minutes apart, beside whatever else runs.
    clock = time.process_time if pipe.device.type == "cpu" else time.perf_counter
    with counted(pipe) as tokens:
        start = clock()
        video = pipe(**prompt, seed=seed, **arguments)
        seconds = clock() - start
    flops = {count: forward_flops(pipe.any_transformer.config, count) for count in set(tokens)}
    passes = sum(flops[count] for count in tokens) / flops[max(tokens)]
    return video.as_uint8()[0], passes, seconds


def measure(
    pipe: Any, name: str, prompts: Sequence[Mapping[str, Any]], exact: list[np.ndarray], judge: Any
) -> Measured:
    """Make all videos by a setting; those of the exact one are appended to `exact`."""
    found, videos, setting = Measured(), [], dict(SETTINGS[name])
    with quantized(pipe, setting.pop("quantize", None)):
        made = [make(pipe, setting, prompt, seed) for seed, prompt in enumerate(prompts)]
    for seed, (frames, passes, seconds) in enumerate(made):
        if name == EXACT:
            exact.append(frames)
        values = compare(frames, exact[seed])
        for values_of, value in zip((found.psnr, found.ssim, found.distance), values, strict=True):
            values_of.append(value)
        found.passes.append(passes)
        found.seconds.append(seconds)
        videos.append(frames)
    found.scores = judge(videos)
    return found


def row(name: str, found: Measured, exact: Measured) -> Row:
    """Return a setting's row: medians, and ratios to the exact videos'."""
    ratios = {
        kind: statistics.median(
            a / b for a, b in zip(getattr(exact, kind), getattr(found, kind), strict=True)
        )
        for kind in ("passes", "seconds")
    }
    medians = {kind: statistics.median(getattr(found, kind)) for kind in ("psnr", "ssim", "distance")}
    fall = max((exact.scores[key] - found.scores[key] for key in JUDGED if key in found.scores), default=None)
    return {
        "name": name,
        "passes": statistics.median(found.passes),
        "fewer": ratios["passes"],
        "faster": ratios["seconds"],
        **medians,
        "psnr_worst": min(found.psnr),
        "fall": fall,
        "scores": found.scores,
    }


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown, the largest saving last."""
    head = "| | passes | fewer | faster | PSNR (worst) | SSIM | 1 − MS-SSIM | judge falls by, points |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: r["fewer"]):
        fall = "" if r["fall"] is None else f"{max(0.0, 100 * r['fall']):.0f}"
        psnr = "" if r["name"] == EXACT else f"{r['psnr']:.1f} ({r['psnr_worst']:.1f}) dB"
        lines.append(
            f"| `{r['name']}` | {r['passes']:.3g} | {r['fewer']:.2f}× | {r['faster']:.2f}× | {psnr} "
            f"| {r['ssim']:.3f} | {r['distance']:.3f} | {fall} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw error against speed: a line for each method, and what no other setting beats in both."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    told = [r for r in rows if r["name"] not in (EXACT, *QUANTIZED)]
    best = frontier(told)
    axes.plot(*_points(best), color="gold", linewidth=7, alpha=0.4, label="frontier", zorder=0)
    for label, (belongs, mark) in _SERIES.items():
        series = sorted((r for r in told if belongs(r["name"])), key=lambda r: r["fewer"])
        axes.plot(*_points(series), mark, markersize=7, linewidth=1, label=label)
    axes.axvline(1, color="black", linewidth=1)
    axes.annotate("exact", (1, 1), (4, -12), xycoords=("data", "axes fraction"), textcoords="offset points")
    axes.set(xlabel="times fewer passes of the transformer", ylabel="PSNR to the exact video, dB (median)")
    axes.grid(alpha=0.3)
    axes.set_xlim(0.95, max(r["fewer"] for r in told) + 0.2)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


# What is drawn: which settings, and their mark and line.
_SERIES: Mapping[str, tuple[Any, str]] = {
    "cache=easy: low, medium, high": (lambda name: name.startswith("cache=easy"), "o-"),
    "cache=mag: low, medium, high": (lambda name: name.startswith("cache=mag"), "s-"),
    "cache=taylor: low, medium, high": (lambda name: name.startswith("cache=taylor"), "^-"),
    "guidance=gated": (lambda name: name == "guidance=gated", "D"),
    "guidance_interval=(0, 0.7)": (lambda name: name.startswith("guidance_interval"), "v"),
    "attention=radial": (lambda name: name == "attention=radial", "*"),
    "a cache and guidance=gated": (lambda name: "+" in name, "P"),
    "resolution_schedule": (lambda name: name.startswith("resolution_schedule"), "*"),
    "75, 50 and 35 % of the steps": (lambda name: name.endswith("steps"), "X-"),
}


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [r["fewer"] for r in rows], [r["psnr"] for r in rows]


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Return the settings that no other one beats in passes and PSNR, by passes."""
    ordered = sorted(rows, key=lambda r: (r["fewer"], r["psnr"]))
    return [r for i, r in enumerate(ordered) if all(r["psnr"] > later["psnr"] for later in ordered[i + 1 :])]


def of_the_miniature(count: int, image: bool = False, size: int = 64) -> tuple[list[dict[str, Any]], Any]:
    """Return held-out prompts, with the first frames that go with them, and what reads their videos."""
    sys.path.insert(0, str(TINY))
    import clips
    import judge

    scenes = judge.choose_scenes(count, 0, "held_out", clips.CORE_MOTIONS)

    def scores(videos: Sequence[np.ndarray]) -> dict[str, float]:
        found = judge.score(scenes, [judge.judge(frames) for frames in videos])
        return {key: float(found[key]) for key in JUDGED}

    given = judge.given_frames(scenes, 0, size, last=False)["image"] if image else ()
    prompts: list[dict[str, Any]] = [{"prompt": clips.canonical(scene)} for scene in scenes]
    for prompt, frame in zip(prompts, given, strict=False):
        prompt["image"] = frame
    return prompts, scores


def main() -> None:
    """Be the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--only", nargs="+", choices=[n for n in SETTINGS if n != EXACT], metavar="NAME")
    parser.add_argument("--miniature", choices=MINIATURES, default="t2v", help="default: t2v")
    parser.add_argument("--checkpoint", help="another one, for text to video, in the miniature's place")
    parser.add_argument("--prompt-file", type=Path, help="a prompt a line, for other checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, setting by setting")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw error against speed")
    options = parser.parse_args()
    if (options.checkpoint is None) != (options.prompt_file is None):
        parser.error("--checkpoint and --prompt-file go together")
    torch.set_num_threads(1)
    if options.checkpoint is None:
        cls, checkpoint, image = MINIATURES[options.miniature]
        pipe = cls.from_pretrained(tiny_checkpoint(checkpoint), dtype=torch.float32)
        prompts, judge = of_the_miniature(options.prompts, image, pipe.preset.height)
    else:
        lines = options.prompt_file.read_text().splitlines()[: options.prompts]
        prompts = [{"prompt": line} for line in lines]
        pipe, judge = WanT2VPipeline.from_pretrained(options.checkpoint, dtype=torch.bfloat16), lambda _: {}
    pipe.to(options.device)
    pipe.set_progress_bar_config(disable=True)
    rows = run(pipe, prompts, judge, options.only or list(SETTINGS)[1:], options.json)
    print(table(rows))
    if options.plot is not None:
        plot(rows, options.plot)


def run(
    pipe: Any, prompts: Sequence[Mapping[str, Any]], judge: Any, names: Sequence[str], file: Path | None
) -> list[Row]:
    """Measure settings one after the other; those that a file has already are not measured again."""
    known: list[Row] = []
    if file is not None and file.is_file():
        known = [r for r in json.loads(file.read_text())["rows"] if r["prompts"] == len(prompts)]
    done, exact_videos = {r["name"]: r for r in known}, list[np.ndarray]()
    exact = measure(pipe, EXACT, prompts, exact_videos, judge)
    done[EXACT] = {**row(EXACT, exact, exact), "prompts": len(prompts)}
    for name in names:
        if name not in done:
            found = measure(pipe, name, prompts, exact_videos, judge)
            done[name] = {**row(name, found, exact), "prompts": len(prompts)}
        if file is not None:
            file.write_text(json.dumps({"machine": machine(), "rows": list(done.values())}, indent=2) + "\n")
    return list(done.values())


if __name__ == "__main__":
    main()
