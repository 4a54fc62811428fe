"""The prompt formulas of Wan's guide: text to video, image to video, several shots.

Every field takes free text. `unknown_terms` finds what is written differently from the guide's vocabulary.

Source: Alibaba Cloud Model Studio, "Text-to-video and image-to-video prompt guide". Its formulas for sound
belong to models that make sound.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

from .vocabulary import VOCABULARY

# The vocabulary's tables that each field of a prompt is written from, in the order of the text.
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
    """A prompt for text to video; `str` of it is the text for the model.

    With subject, scene and motion it is the guide's basic formula, with what follows its advanced one.

    Args:
        subject: who or what is seen, and how it looks.
        scene: where it is, background and foreground.
        motion: what moves, how far, how fast, to what effect.
        light: source and kind, such as "daylight, rim light".
        time: of day.
        shot: size, angle and type, such as "close-up, low-angle shot".
        composition: where in the frame the subject is.
        lens: its focal length.
        tone: of the colours.
        camera: its movement.
        style: such as "felt style".
        effect: such as "time-lapse photography".

    Raises:
        ValueError: no subject, or a field that is no string.
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
                f"subject={self.subject!r} must say who or what is seen, such as 'a red fox with frosty fur'"
            )

    def __str__(self) -> str:
        content = _joined([self.subject, self.scene, self.motion])
        look = _joined([getattr(self, name) for name in AESTHETICS])
        style = _joined([getattr(self, name) for name in STYLIZATION])
        return _sentences([content, look, style])


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt for image to video, where the image shows subject, scene and style already.

    Args:
        motion: what moves, how far, how fast.
        camera: its movement, such as "camera pushes in"; "fixed camera" keeps it still.

    Raises:
        ValueError: neither motion nor camera, or one that is no string.
    """

    motion: str
    camera: str = ""

    def __post_init__(self) -> None:
        _check_texts(self)
        if not self.motion.strip() and not self.camera.strip():
            raise ValueError(
                f"motion={self.motion!r} must say what moves, such as 'the fox slowly turns its head', "
                "where camera is empty as well"
            )

    def __str__(self) -> str:
        return _sentences([self.motion, self.camera])


@dataclass(frozen=True)
class Shot:
    """One shot of several.

    Args:
        seconds: how long it lasts, right after the shot before it; or (start, end) in the video.
        prompt: what it shows, free text or by formula.

    Raises:
        ValueError: no prompt, a time that is negative or not finite, or an end that is not after its start.
    """

    seconds: float | tuple[float, float]
    prompt: str | TextPrompt | ImagePrompt

    def __post_init__(self) -> None:
        times = self.seconds if isinstance(self.seconds, tuple) else (0, self.seconds)
        if len(times) != 2 or not all(_is_time(t) for t in times):
            raise ValueError(
                f"seconds={self.seconds!r} must be a length such as 2, or (start, end) such as (0, 2); "
                "none negative"
            )
        start, end = times
        if end <= start:
            nearest = f"({start:g}, {start + 1:g})" if isinstance(self.seconds, tuple) else "1"
            raise ValueError(
                f"seconds={self.seconds!r} must end after it starts; give {nearest}, for example"
            )
        if not isinstance(self.prompt, (str, TextPrompt, ImagePrompt)) or not str(self.prompt).strip():
            raise ValueError(
                f"prompt={self.prompt!r} must say what the shot shows: a text, TextPrompt or ImagePrompt"
            )


@dataclass(frozen=True)
class MultiShot:
    """A prompt for several shots in one video.

    The guide gives this formula for Wan 2.6. Earlier models read it as any other text and may not cut.

    Args:
        overall: what the whole video is about.
        shots: in order.
        seconds: of the video, num_frames / fps; None: the shots are not held to it.

    Raises:
        ValueError: nothing overall, no shots, shots that overlap, or one that ends after the video.
    """

    overall: str
    shots: Sequence[Shot]
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.overall, str) or not self.overall.strip():
            raise ValueError(f"overall={self.overall!r} must say what the whole video is about")
        if not self.shots or not all(isinstance(shot, Shot) for shot in self.shots):
            raise ValueError(f"shots={self.shots!r} must be at least one Shot")
        if self.seconds is not None and not (_is_time(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds={self.seconds!r} must be the video's length, such as 81 / 16, or None")
        object.__setattr__(self, "shots", tuple(self.shots))  # a list could change after the checks
        before = 0.0
        for number, (start, end) in enumerate(self.times(), 1):
            if start < before:
                raise ValueError(
                    f"shot {number} starts at {start:g} s, before shot {number - 1} ends; "
                    f"start it at {before:g} s or later"
                )
            # Lengths that add up to the video's may miss it by rounding.
            if self.seconds is not None and end > self.seconds + 1e-6:
                raise ValueError(
                    f"shot {number} ends at {end:g} s, after the video's {self.seconds:g} s; "
                    f"end it at {self.seconds:g} s, or make more frames"
                )
            before = end

    def times(self) -> list[tuple[float, float]]:
        """Return each shot's start and end in seconds."""
        times: list[tuple[float, float]] = []
        for shot in self.shots:
            before = times[-1][1] if times else 0.0
            times.append(shot.seconds if isinstance(shot.seconds, tuple) else (before, before + shot.seconds))
        return times

    def __str__(self) -> str:
        stamped = [
            f"Shot {number} [{start:g}-{end:g}s] {_sentences([str(shot.prompt)])}"
            for number, (shot, (start, end)) in enumerate(zip(self.shots, self.times(), strict=True), 1)
        ]
        return " ".join([_sentences([self.overall]), *stamped])


Prompt = TextPrompt | ImagePrompt | MultiShot


def unknown_terms(prompt: Prompt) -> dict[str, tuple[str, ...]]:
    """Find what is written in a prompt's camera, light, style, … that the guide's vocabulary does not hold.

    That is no mistake: the models read free text. But "rim lite" may have been meant as "rim light".

    Args:
        prompt: by formula. Subject, scene and motion are always free.

    Returns: each unknown term, with the terms of its field that it resembles, the closest first.
    """
    found: dict[str, tuple[str, ...]] = {}
    for field, term in _terms(prompt):
        if not any(_holds(term, known) for terms in VOCABULARY.values() for known in terms):
            meant = {_plain(known): known for table in TABLES[field] for known in VOCABULARY[table]}
            close = difflib.get_close_matches(_plain(term), meant, n=3, cutoff=0.7)
            found[term] = tuple(meant[match] for match in close)
    return found


def _terms(prompt: Prompt) -> Iterator[tuple[str, str]]:
    """Yield the terms of the fields that have a vocabulary, each with its field."""
    if isinstance(prompt, MultiShot):
        for shot in prompt.shots:
            if not isinstance(shot.prompt, str):
                yield from _terms(shot.prompt)
        return
    for field in fields(prompt):
        if field.name in TABLES:
            terms = re.split(r"[,，、。]|\.\s", getattr(prompt, field.name))
            yield from ((field.name, term.strip(" .")) for term in terms if term.strip(" ."))


def _holds(text: str, term: str) -> bool:
    """Return whether a text names a term, in whole words: "a slow camera pushes in" does."""
    return f" {_plain(term)} " in f" {_plain(text)} "


def _plain(term: str) -> str:
    """Spell a term so that case, hyphens and "lighting" for "light" make no difference."""
    words = re.sub(r"[\s\-]+", " ", term.casefold()).strip()
    return re.sub(r"\blighting\b", "light", words)


def _check_texts(prompt: TextPrompt | ImagePrompt) -> None:
    for field in fields(prompt):
        value: Any = getattr(prompt, field.name)
        if not isinstance(value, str):
            raise ValueError(f"{field.name}={value!r} must be a string; '' leaves it out")


def _is_time(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


def _joined(parts: Sequence[str]) -> str:
    """Join with commas, but not after a part that is a sentence already."""
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
