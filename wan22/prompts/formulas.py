"""The prompt formulas of Wan's guide: text to video, image to video, several shots.

Every field takes free text. `unknown_terms` finds terms that are not in the guide's vocabulary.

Source: Alibaba Cloud Model Studio, "Text-to-video and image-to-video prompt guide", without its formulas for
sound.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

from ..checks import check_real, shown
from .vocabulary import VOCABULARY

# The vocabulary tables of each field, in the order of the text.
TABLES: Mapping[str, tuple[str, ...]] = {
    "light": ("light_source", "lighting"),
    "time": ("time_of_day",),
    "shot": ("shot_size", "angle", "shot_type"),
    "composition": ("composition",),
    "lens": ("lens",),
    "tone": ("tone",),
    "camera": ("camera_movement",),
    "style": ("style",),
    "effect": ("effect",),
}
AESTHETICS = ("light", "time", "shot", "composition", "lens", "tone", "camera")
STYLIZATION = ("style", "effect")
_SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？")  # noqa: RUF001 (Chinese prompts)


@dataclass(frozen=True)
class TextPrompt:
    """A prompt for text to video; `str()` gives the text for the model. Only the subject is needed.

    Subject, scene and motion are the guide's basic formula, the other fields its advanced one.

    Args:
        subject: who or what is seen, and how it looks.
        scene: background and foreground.
        motion: what moves, how far, how fast, to what effect.
        light: source and kind, such as "daylight, rim light".
        time: time of day.
        shot: size, angle and type, such as "close-up, low-angle shot".
        composition: where in the frame the subject is.
        lens: focal length.
        tone: colours.
        camera: camera movement.
        style: visual style, such as "felt style".
        effect: special effect, such as "time-lapse photography".
    """

    subject: str
    scene: str = ""
    motion: str = ""
    _: KW_ONLY
    light: str = ""
    time: str = ""
    shot: str = ""
    composition: str = ""
    lens: str = ""
    tone: str = ""
    camera: str = ""
    style: str = ""
    effect: str = ""

    def __post_init__(self) -> None:
        _check_texts(self)
        if not self.subject.strip():
            raise ValueError(
                f"subject={shown(self.subject)} must say who or what is seen, "
                "such as 'a red fox with frosty fur'"
            )

    def __str__(self) -> str:
        content = _joined([self.subject, self.scene, self.motion])
        look = _joined([getattr(self, name) for name in AESTHETICS])
        style = _joined([getattr(self, name) for name in STYLIZATION])
        return _sentences([content, look, style])


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt for image to video, whose image shows subject, scene and style; one field may be empty.

    Args:
        motion: what moves, how far, how fast.
        camera: camera movement, such as "camera pushes in"; "fixed camera" keeps it still.
    """

    motion: str
    camera: str = ""

    def __post_init__(self) -> None:
        _check_texts(self)
        if not self.motion.strip() and not self.camera.strip():
            raise ValueError(
                f"motion={shown(self.motion)} must say what moves, such as 'the fox slowly turns its head', "
                "where camera is empty as well"
            )

    def __str__(self) -> str:
        return _sentences([self.motion, self.camera])


Prompt = TextPrompt | ImagePrompt


def multi_shot(overall: str, shots: Sequence[tuple[float, str | Prompt]]) -> str:
    """Write several shots into one prompt, each with its time stamp.

    The guide gives this formula for Wan 2.6. Earlier models read it as any other text and may not cut.

    Args:
        overall: what the whole video is about.
        shots: length in seconds, a positive number, and prompt of each shot, in order.
    """
    parts, start = [overall], 0.0
    for number, (seconds, prompt) in enumerate(shots, 1):
        seconds = check_real(f"shot {number}'s seconds", seconds, 0, above=True, hint="such as 2")
        parts.append(f"Shot {number} [{start:g}-{start + seconds:g}s] {_sentences([str(prompt)])}")
        start += seconds
    return _sentences(parts)


def unknown_terms(prompt: Prompt) -> dict[str, tuple[str, ...]]:
    """Find terms in a prompt's camera, light, style, … that are not in the guide's vocabulary.

    They are no mistake, as the models read free text; but "rim lite" may stand for "rim light". Subject,
    scene and motion are not checked.

    Returns: each unknown term, with up to three similar terms of its field, the closest first.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, tables in TABLES.items():
        for term in re.split(r"[,，、。]|\.\s", getattr(prompt, name, "")):
            term = term.strip(" .")
            if not term or any(_holds(term, known) for terms in VOCABULARY.values() for known in terms):
                continue
            spelled = {_plain(known): known for table in tables for known in VOCABULARY[table]}
            close = difflib.get_close_matches(_plain(term), spelled, n=3, cutoff=0.7)
            found[term] = tuple(spelled[match] for match in close)
    return found


def _holds(text: str, term: str) -> bool:
    """Return whether a text holds a term in whole words, as "a slow camera pushes in" does."""
    return f" {_plain(term)} " in f" {_plain(text)} "


def _plain(term: str) -> str:
    """Make terms equal that differ in case, hyphens, or "lighting" for "light"."""
    words = re.sub(r"[\s\-]+", " ", term.casefold()).strip()
    return re.sub(r"\blighting\b", "light", words)


def _check_texts(prompt: TextPrompt | ImagePrompt) -> None:
    for field in fields(prompt):
        value: Any = getattr(prompt, field.name)
        if not isinstance(value, str):
            raise ValueError(f"{field.name}={shown(value)} must be a string; '' leaves it out")


def _joined(parts: Sequence[str]) -> str:
    """Join with commas, or with a space after a whole sentence."""
    text = ""
    for part in filter(None, (part.strip().rstrip(",，") for part in parts)):
        if not text:
            text = part
        elif text.endswith(_SENTENCE_ENDS):
            text += f" {_capitalised(part)}"
        else:
            text += f", {part}"
    return text


def _sentences(parts: Sequence[str]) -> str:
    whole = []
    for part in filter(None, (part.strip() for part in parts)):
        whole.append(_capitalised(part) + ("" if part.endswith(_SENTENCE_ENDS) else "."))
    return " ".join(whole)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
