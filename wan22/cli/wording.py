"""The words of a command's messages: its flags, where the library's errors name Python's arguments."""

import re
from collections.abc import Mapping

from .signatures import PIPELINES

# What a flag becomes further inside, where errors have other names for it.
ALIASES = {"vram": "memory", "method": "quantize"}
# What Python calls, and what a command line says for it.
PHRASES = {
    **{name: f"wan22 {task}" for task, name in PIPELINES.items()},
    "pipe.fit()": "--memory",
    "call pipe.vae.disable_tiling() first": "leave --tiling out",
}


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return a message in a command's words; `flags` has the flag of each of its arguments.

    `seed=-1 must be` becomes "--seed -1 must be", and `overwrite=True replaces it` "--overwrite replaces it".
    """
    for phrase, words in PHRASES.items():
        message = message.replace(phrase, words)
    known = {**flags, **{alias: flags[name] for alias, name in ALIASES.items() if name in flags}}
    for name in sorted(known, key=len, reverse=True):
        flag = known[name]

        def assigned(found: re.Match[str], flag: str = flag) -> str:
            value = next((text for text in found.groups() if text is not None), "")
            return flag if value in ("", "True") else f"{flag} {_quoted(value)}"

        value = r"""(?:'([^']*)'|"([^"]*)"|(\[[^\]]*\]|[^\s,;:()]+))?"""
        message = re.sub(rf"(?<![\w.\-]){name}={value}", assigned, message)
        if "_" in name:
            message = re.sub(rf"(?<![\w.\-/]){name}(?![\w.\-/])", flag, message)
    return message


def _quoted(value: str) -> str:
    return f'"{value}"' if re.search(r"\s", value) and value[0] not in "[{" else value
