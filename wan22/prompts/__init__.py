"""Prompts: the formulas and terms of Wan's prompt guide, and extension by a chat model."""

from .chat import ChatError, ChatModel, Message, OpenAIChat, TransformersChat
from .extend import extend_prompt
from .formulas import ImagePrompt, TextPrompt, multi_shot, unknown_terms
from .vocabulary import VOCABULARY

__all__ = [
    "VOCABULARY",
    "ChatError",
    "ChatModel",
    "ImagePrompt",
    "Message",
    "OpenAIChat",
    "TextPrompt",
    "TransformersChat",
    "extend_prompt",
    "multi_shot",
    "unknown_terms",
]
