"""Make the small tokenizer of the embedded checkpoint: the captions' words, and characters for all others.

    python examples/tiny/tokenizer.py --out runs/tiny

Writes runs/tiny/tokenizer, which transformers reads as a T5 tokenizer.
"""

from __future__ import annotations

import re
import string
from pathlib import Path

import clips
import numpy as np
from common import arguments
from transformers import T5TokenizerFast  # type: ignore[attr-defined]

SPACE = "▁"  # stands for the space before a word
WORD_SCORE, CHARACTER_SCORE = -1.0, -10.0  # log probabilities: whole words are preferred


def caption_words(samples: int = 20000) -> list[str]:
    """Return the words that occur in captions, in alphabetical order."""
    rng = np.random.default_rng(0)
    words: set[str] = set()
    for scene in clips.sample_scenes(rng, samples):
        words.update(re.findall(r"[a-z]+", clips.caption(scene, rng)))
    return sorted(words)


def make_tokenizer() -> T5TokenizerFast:
    """Build the tokenizer: caption words in three spellings (red, Red, RED), characters for the rest."""
    words = [spelling for word in caption_words() for spelling in (word, word.capitalize(), word.upper())]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(SPACE + word, WORD_SCORE) for word in dict.fromkeys(words)]
    characters = SPACE + string.ascii_letters + string.digits + string.punctuation
    vocabulary += [(character, CHARACTER_SCORE) for character in characters]
    # transformers 5 rebuilds a T5 tokenizer from nothing but its vocabulary, so a normaliser would get lost.
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder."""
    make_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    write_tokenizer(arguments(__doc__).out / "tokenizer")
