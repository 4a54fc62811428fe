"""Formulas by their names: from what `guidance=` was given, and as recipes hold them."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from ....checks import check_choice, shown, unknown_argument
from ..request import plain
from .formulas import APG, TCFG, CFGZeroStar, MamboG
from .from_diffusers import DiffusersGuider, guider_of_diffusers
from .guider import ClassifierFreeGuidance, Guider
from .nag import NAG
from .wrappers import Gated, Rescale, SkipLayer, Wrapper

PLAIN = ClassifierFreeGuidance()
_CLASSES: tuple[type[Guider], ...] = (
    *(ClassifierFreeGuidance, CFGZeroStar, APG, TCFG, MamboG, NAG),
    *(Rescale, SkipLayer, Gated),
)
GUIDERS = {cls.name: cls for cls in _CLASSES}


def as_guider(given: Any) -> Guider:
    """Return the formula that is meant.

    Args:
        given: a Guider; its name; a table with its name and settings, also as JSON; one of diffusers'
            guiders; None: plain guidance.

    Raises: ValueError: there is no such formula, it has no such setting, or a value breaks its rule.
    """
    if given is None:
        return PLAIN
    if isinstance(given, str):
        return as_guider(_from_json(given)) if given.lstrip().startswith("{") else _of_name(given)
    if isinstance(given, Mapping):
        return _of_table(dict(given))
    if not isinstance(given, Guider):
        given = _of_diffusers(given)
    if isinstance(given, Wrapper):
        inner = as_guider(given.guider)
        if isinstance(inner, NAG):
            raise ValueError(
                f"{shown(given.name)} works with the passes of two prompts, and 'nag' has only one"
            )
        given = replace(given, guider=inner)
    return given


def recorded(guider: Guider) -> dict[str, Any] | None:
    """Return a formula's name and settings as plain values; None for plain guidance."""
    return None if guider == PLAIN else _table(guider)


def not_recordable(guider: Guider) -> str | None:
    """Return why no recipe can hold a formula; None if one can."""
    inner = guider.guider if isinstance(guider, Wrapper) else guider
    if type(inner) in _CLASSES or (isinstance(inner, DiffusersGuider) and inner.of_the_library):
        return None
    kind = type(inner.guider if isinstance(inner, DiffusersGuider) else inner)
    return f"guidance is a {kind.__name__}, a class of the caller's own"


def _table(guider: Guider) -> dict[str, Any]:
    if isinstance(guider, DiffusersGuider):
        return {"name": guider.name, "class": type(guider.guider).__name__, "config": plain(guider.config)}
    settings = {f.name: getattr(guider, f.name) for f in fields(guider)} if is_dataclass(guider) else {}
    if isinstance(guider, Wrapper):
        settings["guider"] = _table(guider.guider)
    return {"name": guider.name or type(guider).__name__, **plain(settings)}


def _of_name(name: str) -> Guider:
    check_choice("guidance", name, GUIDERS)
    return as_guider(GUIDERS[name]())


def _of_table(table: dict[str, Any]) -> Guider:
    name = table.pop("name", None)
    if name == DiffusersGuider.name:
        return guider_of_diffusers(table.get("class"), table.get("config"))
    check_choice("guidance: name", name, GUIDERS)
    known = [f.name for f in fields(GUIDERS[name])]  # type: ignore[arg-type]
    if unknown := [setting for setting in table if setting not in known]:
        raise ValueError(unknown_argument(f"guidance {shown(name)}", str(unknown[0]), known))
    return as_guider(GUIDERS[name](**table))


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        rule = 'a name, or JSON such as \'{"name": "apg", "eta": 0.5}\''
        raise ValueError(f"guidance={shown(text)} must be {rule}: {error}") from None


def _of_diffusers(given: Any) -> DiffusersGuider:
    from diffusers.guiders import BaseGuidance

    if not isinstance(given, BaseGuidance):
        rule = "a name, an object of wan22.guidance, or a guider of diffusers"
        raise ValueError(f"guidance={shown(given)} must be {rule}")
    return DiffusersGuider(given)
