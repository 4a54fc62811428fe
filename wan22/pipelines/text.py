"""Prompt cleaning and umT5 encoding.

Shapes: b prompts, s text rows, d width of the text encoder.
"""

import html
import logging
import re
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import get_module_execution_device

from ..presets import MAX_TEXT_TOKENS

logger = logging.getLogger(__name__)


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities (twice) and collapse white space.

    Source: Wan2.2 wan/modules/tokenizers.py, basic_clean and whitespace_clean.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def encode_prompt(
    tokenizer: Any, text_encoder: Any, prompt: str, max_tokens: int = MAX_TEXT_TOKENS
) -> torch.Tensor:
    """Encode one prompt by itself, so that the result cannot depend on its neighbours in a batch.

    Args:
        tokenizer: of umT5, from transformers.
        text_encoder: UMT5EncoderModel.
        prompt: cleaned here.
        max_tokens: longer prompts are cut, with a warning; 1 to 512, the end token included.

    Returns: "1 512 d", zero past the prompt's end, on the text encoder's device and in its dtype.
    """
    text = clean_prompt(prompt)
    ids = tokenizer(text, truncation=False, add_special_tokens=True, verbose=False).input_ids
    if len(ids) > max_tokens:
        cut = tokenizer.decode(ids[max_tokens - 1 : -1])
        logger.warning("the prompt has %d tokens, %d are used; ignored: %r", len(ids), max_tokens, cut)
        ids = ids[: max_tokens - 1] + ids[-1:]
    # Offloaded weights lie elsewhere than they run.
    input_ids = torch.tensor([ids], device=get_module_execution_device(text_encoder))
    rows = text_encoder(input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state
    return pad_rows(rows)


def pad_rows(rows: torch.Tensor) -> torch.Tensor:
    """Append zero rows: "b s d" to "b 512 d"."""
    return F.pad(rows, (0, 0, 0, MAX_TEXT_TOKENS - rows.shape[1]))
