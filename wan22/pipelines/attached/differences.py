"""What makes a pipeline as it stands give another video than a recipe's, each thing by name."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...checks import cut
from ...video.privacy import without_folders
from ...video.recipe import IMAGES, Origin, Recipe, UsedLora
from ..call.images import Picture, one_per_video

logger = logging.getLogger(__name__)

# Changes that move results by rounding, and that a machine with other memory needs.
ROUNDING = ("token_parts",)


def differences(recipe: Recipe, now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is not as it was; `now` is what a recipe of the pipeline would say, `run_metadata`."""
    if recipe.not_reproducible_because is not None:
        yield f"the video cannot be made again from its recipe: {cut(recipe.not_reproducible_because)}"
    yield from _weights(recipe, now)
    if _contents(recipe.loras) != _contents(now["loras"]):
        wanted, loaded = (
            cut(", ".join(f"{lora.source} at {dict(lora.strengths)}" for lora in loras))
            for loras in (recipe.loras, now["loras"])
        )
        yield f"the recipe has LoRAs: {wanted or 'none'}; loaded are: {loaded or 'none'}"
    if (had := dict(recipe.dtypes)) != now["dtypes"]:
        yield f"the recipe was made with dtypes {cut(had)}; this pipeline has {cut(now['dtypes'])}"
    then, here = (
        {name: value for name, value in changes.items() if name not in ROUNDING}
        for changes in (recipe.changes, now["changes"])
    )
    if not _same_changes(then, here):
        yield f"the recipe was made with changes {cut(then)}; this pipeline has {cut(here)}"
    if recipe.boundary_ratio != now["boundary_ratio"]:
        yield f"the recipe's boundary_ratio is {recipe.boundary_ratio}, this one's {now['boundary_ratio']}"


def different_pictures(recipe: Recipe, pictures: Mapping[str, Sequence[Picture]]) -> Iterator[str]:
    """Yield the arguments whose pictures are others than the recipe's."""
    for name, marks in recipe.pictures.items():
        given = [picture.mark for picture in pictures.get(name, ())]
        if not given:  # left out by the caller, who knows of it
            continue
        count = max(len(marks), len(given))
        pairs = zip(one_per_video(marks, count), one_per_video(given, count), strict=True)
        if other := [i for i, (then, now) in enumerate(pairs) if then != now]:
            which = f"{name}[{other[0]}]" if count > 1 else name
            yield f"{which} has other pixels than the recipe's picture"


def warn_of_the_rest(recipe: Recipe, now: Mapping[str, Any]) -> None:
    """Log what moves the video by rounding, and what the recipe does not tell enough of."""
    rounding = [what for what in ("device", "versions") if getattr(recipe, what) != now[what]]
    rounding += [name for name in ROUNDING if recipe.changes.get(name) != now["changes"].get(name)]
    if rounding:
        logger.warning("%s differ from the recipe's: results may differ by rounding", sorted(rounding))
    if unknown := [lora.name for lora in recipe.loras if lora.strengths.keys() - lora.files.keys()]:
        _warn("the LoRA", unknown, "was in memory")
    if unknown := _of_unknown_files(recipe.origin, now):
        _warn("the weights of", unknown, "are of no file that the recipe and the pipeline both know")
    older = [n for n, value in recipe.changes.items() if _is_older(value, now["changes"].get(n))]
    if older:
        _warn("the recipe names, without its settings,", older, "an earlier version wrote it")
    if unknown := [name for name in IMAGES if recipe.call.get(name) and name not in recipe.pictures]:
        _warn("the recipe's", unknown, "has no fingerprint: an earlier version wrote it")


def _warn(what: str, names: Sequence[str], why: str) -> None:
    listed = cut(", ".join(names))
    logger.warning("%s %s: %s; whether it is the same now cannot be told", what, listed, why)


# ---- weights ----


def _weights(recipe: Recipe, now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what tells that the weights are others."""
    then, here = recipe.origin, now["origin"]
    if then is None or here is None:
        if without_folders(recipe.checkpoint) != without_folders(now["checkpoint"]):
            yield f"the recipe is of {cut(recipe.checkpoint)}, this is {now['checkpoint']}"
        return
    had, have = _by_component(then), _by_component(here)
    for name in sorted(had.keys() | have.keys()):
        if sorted(had.get(name, {}).values()) != sorted(have.get(name, {}).values()):
            # By what they hold: a file may have got another name.
            mine, theirs = have.get(name, {}), had.get(name, {})
            others = [f for f in (*mine, *theirs) if mine.get(f) != theirs.get(f)]
            file = cut(f"{name}/{others[0]}")
            yield f"the recipe is of {cut(then.place)}, this is {here.place}: {file} is another file"
            return


def _by_component(origin: Origin) -> dict[str, dict[str, str]]:
    """Return the fingerprints of files by component and file name."""
    found: dict[str, dict[str, str]] = {}
    for path, mark in origin.files.items():
        component, _, file = path.partition("/")
        found.setdefault(component, {})[file] = mark
    return found


def _of_unknown_files(then: Origin | None, now: Mapping[str, Any]) -> list[str]:
    """Return the models of which the recipe's files or the present ones are not known."""
    here = now["origin"]
    if then is None or here is None:
        return sorted(now["dtypes"])
    return sorted({*then.replaced, *here.replaced} & now["dtypes"].keys())


def _contents(used: tuple[UsedLora, ...]) -> list[Any]:
    """Return LoRAs without their names and paths."""
    return sorted((sorted(lora.files.items()), sorted(lora.strengths.items())) for lora in used)


# ---- changes, whose settings earlier versions did not write ----


def _same_changes(then: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    return then.keys() == here.keys() and all(
        value == here[name] or _is_older(value, here[name]) for name, value in then.items()
    )


def _is_older(then: Any, here: Any) -> bool:
    """Whether a recipe's entry is the present one without settings: names alone, or that it was on."""
    if not isinstance(here, Mapping) or isinstance(then, Mapping):
        return False
    return then is True or (isinstance(then, tuple) and sorted(map(str, then)) == sorted(here))
