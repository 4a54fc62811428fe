"""Prompts: checked, cleaned, encoded by umT5.

Shapes: b prompts, l text tokens, d width of the text encoder.
"""

import html
import logging
import re
import threading
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import get_module_execution_device

from ...checks import cut, shown
from ...presets import MAX_TEXT_TOKENS
from .checks import as_prompts, check_embeds
from .request import Request

logger = logging.getLogger(__name__)

# A fast tokenizer is set to truncate or not at each call, and raises while another thread uses it.
_TOKENIZING = threading.Lock()


def check_prompts(
    request: Request, text_dim: int, default_negative: str, count: int | None
) -> tuple[list[str | None], list[str | None]]:
    """Return a call's prompts and negative prompts, completed; None for given embeddings."""
    if (request.prompt is None) == (request.prompt_embeds is None):
        raise ValueError("give prompt or prompt_embeds, and only one of them")
    if request.prompt_embeds is not None:
        check_embeds("prompt_embeds", request.prompt_embeds, text_dim, count)
        prompts: list[str | None] = [None] * len(request.prompt_embeds)
    else:
        prompts = list(as_prompts("prompt", request.prompt, count))
    if request.negative_prompt_embeds is None:
        text = "" if request.negative_prompt is None else request.negative_prompt
        texts = as_prompts("negative_prompt", text, len(prompts))
        return prompts, [text or default_negative for text in texts]
    if request.negative_prompt is not None:
        raise ValueError("give negative_prompt or negative_prompt_embeds, not both")
    check_embeds("negative_prompt_embeds", request.negative_prompt_embeds, text_dim, len(prompts))
    return prompts, [None] * len(prompts)


def check_text_encoder(pipe: Any, request: Request, guided: bool) -> None:
    """Refuse text that nothing can encode."""
    needed = {"prompt": request.prompt_embeds is None}
    needed["negative_prompt"] = guided and request.negative_prompt_embeds is None
    for name in (name for name, is_needed in needed.items() if is_needed):
        for component in ("text_encoder", "tokenizer"):
            if getattr(pipe, component) is None:
                raise ValueError(
                    f"pipe.{component} is None; load it, or give {name}_embeds instead of {name}"
                )
        pipe.check_width("text_encoder", "text_dim")


def check_tokenizer(tokenizer: Any, text_encoder: Any) -> None:
    """Refuse a tokenizer that knows no words, or more tokens than the text encoder.

    transformers makes one of a folder without a vocabulary, to which every word is unknown. A class of the
    caller's own passes.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    place = cut(tokenizer.name_or_path or "in memory")
    try:
        with _TOKENIZING:
            ids = tokenizer("a cat", add_special_tokens=False).input_ids
    except Exception as error:  # the class that tokenizers raises
        raise ValueError(f"the tokenizer, {place}, cannot be used: {cut(error)}") from error
    if set(ids) <= {tokenizer.unk_token_id}:
        raise ValueError(f"the tokenizer, {place}, knows no words: its vocabulary is not there")
    known, rows = len(tokenizer), getattr(getattr(text_encoder, "config", None), "vocab_size", None)
    if rows is not None and known > rows:
        raise ValueError(
            f"the tokenizer has {known} tokens, the text encoder {rows}; they are of different checkpoints"
        )


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities (twice) and collapse white space.

    Source: Wan2.2 wan/modules/tokenizers.py, basic_clean and whitespace_clean.
    """
    # Of printable ASCII there is nothing to repair, and importing ftfy takes as long as some sampling steps.
    if not (text.isascii() and text.isprintable()) or "&" in text:
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def encode_prompt(
    tokenizer: Any, text_encoder: Any, prompt: str, max_tokens: int = MAX_TEXT_TOKENS
) -> torch.Tensor:
    """Encode one prompt by itself, so that the result cannot depend on its neighbours in a batch.

    A prompt is cut, with a warning, at `max_tokens`, 1 to 512, the end token included.

    Returns: "1 512 d", zero past the prompt's end, on the text encoder's device and in its dtype.
    """
    text = clean_prompt(prompt)
    with _TOKENIZING:
        ids = tokenizer(text, truncation=False, add_special_tokens=True, verbose=False).input_ids
    if len(ids) > max_tokens:
        unused = tokenizer.decode(ids[max_tokens - 1 : -1])
        logger.warning(
            "the prompt has %d tokens, %d are used; ignored: %s", len(ids), max_tokens, shown(unused)
        )
        ids = ids[: max_tokens - 1] + ids[-1:]
    # Offloaded weights lie elsewhere than they run.
    input_ids = torch.tensor([ids], device=get_module_execution_device(text_encoder))
    embeds = text_encoder(input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state
    return pad_tokens(embeds)


def warn_of_unknown_words(tokenizer: Any, prompts: Iterable[str | None], name: str) -> None:
    """Warn of prompts of which a miniature, called `name`, knows few words: it has seen shapes alone."""
    for text in filter(None, prompts):
        words = clean_prompt(text).split()
        with _TOKENIZING:
            ids = [tokenizer(word, add_special_tokens=False, verbose=False).input_ids for word in words[:100]]
        known = sum(len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id for tokens in ids)
        if 2 * known < len(ids):
            logger.warning(
                "%s is a miniature that knows coloured shapes, in English, and %d of the %d words of %s; "
                "say 'a red circle moves to the right on a blue background', or load a released checkpoint",
                *(name, known, len(ids), shown(text)),
            )


def pad_tokens(embeds: torch.Tensor) -> torch.Tensor:
    """Append zero tokens: "b l d" to "b 512 d"."""
    return F.pad(embeds, (0, 0, 0, MAX_TEXT_TOKENS - embeds.shape[1]))
