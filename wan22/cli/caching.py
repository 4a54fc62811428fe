"""`wan22 cache`: encode a data set once, so that training loads neither VAE nor text encoder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import as_path, cut, shown
from .loading import dtype_of, find_device, find_model, hub_options
from .options import Clips, Loading, Output
from .reporting import aligned, print_lines, say, warn

if TYPE_CHECKING:
    from ..training.data.cache import Planned, Report

_CAPTION = 60  # characters of a caption that a listing shows


def cache_data(
    data: str, folder: Path | None, loading: Loading, clips: Clips, dry_run: bool, prune: bool, output: Output
) -> None:
    """Check a data set, encode what its folder lacks, and report; `dry_run`: check and list it."""
    if loading.model is None:
        say("no --model given: this is for tiny-t2v, the miniature inside wan22, of coloured shapes")
    from ..progress import loading_bars
    from ..training.data.cache import fill, plan

    source = find_model(loading.model, "t2v")
    if Path(source).is_file():
        raise ValueError(f"--model {cut(loading.model)} is a file; give a folder, or a repository")
    folder = folder or _folder_for(data)
    dtype = dtype_of(loading, None)
    planned = plan(
        source,
        data,
        folder,
        device=find_device(loading.device),
        dtype=dtype["default"] if isinstance(dtype, dict) else dtype,
        skip=clips.skip,
        progress=output.draws_bars,
        hub=hub_options(loading),
        **_settings(clips),
    )
    if dry_run:
        _print_plan(planned, folder, clips.latents_dtype, output)
        return
    say(f"{len(planned.items)} clips for {planned.encoders.outline.checkpoint_name}, to {folder}")
    with loading_bars(output.draws_bars):
        report = fill(planned, folder, clips.latents_dtype, prune, output.draws_bars)
    _print_report(planned, report, output)


def _folder_for(data: str) -> Path:
    """Return the folder that a TOML file names, or one beside the data."""
    path = as_path(data)
    if path.suffix.lower() == ".toml" and path.is_file():
        from ..training.data.dialect import read_toml

        if (named := read_toml(path)[1]) is not None:
            return Path(named)
    return path.with_name(f"{path.stem if path.suffix else path.name}-cache")


def _settings(clips: Clips) -> dict[str, Any]:
    """Return the fields of DataConfig that the options give."""
    given: dict[str, Any] = {
        "resolution": None if clips.resolution is None else _numbers("resolution", clips.resolution, "x"),
        "frames": None if clips.frames is None else _numbers("frames", clips.frames, ","),
        "extraction": clips.extraction,
        "every_length": clips.every_length or None,
        "stride": clips.stride,
        "samples": clips.samples,
        "max_frames": clips.max_frames,
        "keep_fps": clips.keep_fps or None,
        "source_fps": clips.source_fps,
        "buckets": False if clips.no_buckets else None,
        "upscale": False if clips.no_upscale else None,
        "repeats": clips.repeats,
        "caption_extension": clips.caption_extension,
        "default_caption": clips.default_caption,
    }
    return {name: value for name, value in given.items() if value is not None}


def _numbers(name: str, text: str, separator: str) -> tuple[int, ...]:
    """Return numbers with a separator between: two with "x", any with a comma."""
    try:
        numbers = tuple(int(part) for part in text.lower().split(separator))
    except ValueError:
        numbers = ()
    if not numbers or (separator == "x" and len(numbers) != 2):
        example = "832x480" if separator == "x" else "17,33,81"
        raise ValueError(f"{name}={shown(text)} must be whole numbers, such as {example}")
    return numbers


# ---- what is printed ----


def _buckets(planned: "Planned") -> list[dict[str, int]]:
    return [
        {"frames": t, "height": h, "width": w, "clips": clips, "with_repeats": repeated}
        for (t, h, w), (clips, repeated) in planned.buckets.items()
    ]


def _table(planned: "Planned") -> str:
    """Return the buckets with their counts, as lines."""
    rows = [("size", "frames", "clips", "with repeats")]
    for bucket in _buckets(planned):
        size = f"{bucket['width']}x{bucket['height']}"
        rows.append((size, str(bucket["frames"]), str(bucket["clips"]), str(bucket["with_repeats"])))
    return aligned(rows)


def _print_plan(planned: "Planned", folder: Path, latents_dtype: str, output: Output) -> None:
    """Print all clips, sizes and bytes."""
    nbytes = sum(planned.nbytes(item, latents_dtype) for item in planned.items)
    name = planned.encoders.outline.checkpoint_name
    if output.as_json:
        items = [
            {"file": str(item.file), "start": item.start, "bucket": item.bucket, "repeats": item.repeats}
            | {"caption": item.caption}
            for item in planned.items
        ]
        found = {"model": name, "folder": str(folder), "bytes": nbytes, "buckets": _buckets(planned)}
        print(json.dumps(found | {"items": items}))
        return
    rows = []
    for item in planned.items:
        frames, height, width = item.bucket
        caption = item.caption if len(item.caption) <= _CAPTION else f"{item.caption[:_CAPTION]}…"
        shown_frames = f"{item.start}-{item.start + frames - 1}"
        rows.append((item.file.name, shown_frames, f"{width}x{height}", " ".join(caption.split())))
    print_lines(aligned([("file", "frames", "size", "caption"), *rows]), "", _table(planned))
    print_lines(f"{len(planned.items)} clips for {name}, at most {nbytes / 1e6:.3g} MB, to {folder}")


def _print_report(planned: "Planned", report: "Report", output: Output) -> None:
    """Print what was done, and the sizes of the clips."""
    folder = report.clips.folder
    if output.as_json:
        found = {"folder": str(folder), "clips": len(report.clips), "encoded": report.encoded}
        found |= {"captions": report.captions, "kept": report.kept, "stale": list(report.stale)}
        found |= {"pruned": report.pruned, "seconds": round(report.seconds, 2)}
        print(json.dumps(found | {"buckets": _buckets(planned)}))
        return
    say(_table(planned))
    say(
        f"{report.encoded} clips and {report.captions} captions encoded, {report.kept} clips were there; "
        f"{report.seconds:.1f} s"
    )
    if report.stale:
        names, more = report.stale[:5], len(report.stale) - 5
        which = ", ".join(map(cut, names)) + (f" and {more} more" if more > 0 else "")
        what = "removed" if report.pruned else "no clip needs them; --prune removes them"
        warn(f"{len(report.stale)} files of earlier runs: {what}: {which}")
    print_lines(folder)
