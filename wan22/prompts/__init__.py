"""Prompts: the formulas and terms of Wan's prompt guide, and extension by a chat model."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import ChatError, ChatModel, Message, OpenAIChat, TransformersChat
    from .extend import extend_prompt
    from .formulas import ImagePrompt, MultiShot, Shot, TextPrompt, unknown_terms
    from .vocabulary import VOCABULARY

__all__ = [  # noqa: RUF022 (grouped by use)
    "TextPrompt",
    "ImagePrompt",
    "MultiShot",
    "Shot",
    "unknown_terms",
    "VOCABULARY",
    "extend_prompt",
    "OpenAIChat",
    "TransformersChat",
    "ChatModel",
    "Message",
    "ChatError",
]
_MODULES = {
    "formulas": ("TextPrompt", "ImagePrompt", "MultiShot", "Shot", "unknown_terms"),
    "vocabulary": ("VOCABULARY",),
    "extend": ("extend_prompt",),
    "chat": ("OpenAIChat", "TransformersChat", "ChatModel", "Message", "ChatError"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
