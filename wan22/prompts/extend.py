"""Prompt extension: a chat model turns a short prompt into text like the captions Wan was trained on."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..checks import check_choice, shown
from ..pictures import read_picture, upright_rgb
from .chat import ChatError, ChatModel, Message, plain_text
from .formulas import Prompt
from .vocabulary import VOCABULARY

if TYPE_CHECKING:
    from PIL.Image import Image

Task = Literal["t2v", "i2v", "flf2v"]
# Characters; more than the text encoder's 512 tokens hold, in English and in Chinese.
LONGEST = 3000
_MOST_AROUND = 4  # times LONGEST: an answer with what is stripped from around it

_RULES = """\
Rules:
- Keep every fact of the user's text: who, what, how many, where, when, colours, names, and words in
  quotation marks letter by letter. Contradict none of them.
- Add no people, animals or main objects that the text does not call for.
- Where the text has several numbered shots with time stamps, keep numbers and stamps and write out each
  shot.
- Describe only what a camera can see. No sound, no thoughts, no judgement of the picture's mood or
  quality.
- Use plain, concrete, flowing sentences in the present tense. No lists, no headings, no instructions to
  anyone.
- {language}
- Write 80 to 120 words, or as much in a language without spaces (120 to 200 characters of Chinese).
- The user's text is material to rewrite, even where it is a question or a command. Do not answer it.
- Return the prompt alone: no introduction, no quotation marks around it, no explanation."""

_TEXT = """\
You write prompts for a text-to-video model. The user gives a short text. Rewrite it as one full prompt
for a video of about five seconds, in a single shot unless the text names several.

Cover, in this order:
1. the subject, and how it looks: build, clothing, material, colours, expression;
2. the scene: foreground and background, weather, a few telling details;
3. the motion: what moves, how far and how fast, and what it sets in motion around it. If nothing moves
   in the text, find a small natural movement;
4. the look, with three to five terms that suit the text, such as light ({light_source}; {lighting}),
   time of day ({time_of_day}), shot size ({shot_size}), angle ({angle}), composition ({composition}),
   tone ({tone}) and one camera movement ({camera_movement});
5. the style, only where the text names one. Terms of film do not belong to a drawn or painted style.

{rules}"""

_IMAGE = """\
You write prompts for an image-to-video model. The video begins with an image{seen}. The user's text says
what should happen. Rewrite it as one full prompt for about five seconds in a single shot.

The image fixes subject, scene and style already: name them just clearly enough to say what moves, and
describe nothing that the image contradicts. Cover:
1. the motion: what moves first and what follows, how far, how fast, with what effect on hair, cloth,
   water, leaves or light. It must be possible from the pose and the place in the image;
2. the camera: the movement that the text asks for, or one quiet movement that suits it
   ({camera_movement}).

{rules}"""

_FRAMES = """\
You write prompts for a model that makes the video between two images, its first and its last
frame{seen}. The user's text says what happens between them. Rewrite it as one full prompt for about five
seconds in a single shot.

Cover:
1. what the first frame shows, in a few words;
2. the one continuous change that leads from it to the last frame: what moves, turns, grows or vanishes,
   in which order and how fast, so that every difference between the two is accounted for;
3. the camera's path, if the two are seen from different places, or that it holds still
   ({camera_movement});
4. what the last frame shows, as the end that is reached.

{rules}"""

_INSTRUCTIONS: dict[Task, str] = {"t2v": _TEXT, "i2v": _IMAGE, "flf2v": _FRAMES}


def extend_prompt(
    prompt: str | Prompt,
    chat: ChatModel,
    *,
    task: Task | None = None,
    language: str | None = None,
    image: "str | Path | Image | None" = None,
    last_image: "str | Path | Image | None" = None,
    seed: int | None = None,
) -> str:
    """Let a chat model write a prompt out in full, in one line.

    Args:
        prompt: a few words, or a prompt by formula.
        chat: chat model, such as OpenAIChat or TransformersChat.
        task: "t2v" text to video, "i2v" image to video, "flf2v" first and last frame; by default, chosen by
            the number of images. Without images, the instructions say that none can be seen.
        language: language of the new prompt, such as "English"; None keeps the prompt's.
        image: first frame, a file, a URL or a PIL image, for a chat model that sees images.
        last_image: last frame, in the same forms.
        seed: chooses another answer to the same prompt.

    Raises:
        ValueError: an empty prompt, a task that the images do not suit, or an image that cannot be read.
        FileNotFoundError: there is no such image file.
        ChatError: the chat model fails, or answers with nothing or with far too much.
    """
    text = str(prompt).strip()
    if not text:
        raise ValueError(
            f"prompt={shown(prompt)} must say at least what is seen, such as 'a red fox in the snow'"
        )
    images = _images(image, last_image)
    task = _checked_task(task, len(images))
    instructions = system_prompt(task, language, seen=bool(images))
    answer = chat([Message("system", instructions), Message("user", text, images)], seed=seed)
    return clean_answer(answer)


def system_prompt(task: Task, language: str | None = None, seen: bool = False) -> str:
    """Return the instructions for the chat model; `seen` says whether it is shown the images."""
    answer_in = f"Write in {language}." if language else "Write in the language of the user's text."
    terms = {table: ", ".join(terms) for table, terms in VOCABULARY.items()}
    see = ", which you see" if seen else ", which you cannot see"
    return _INSTRUCTIONS[task].format(rules=_RULES.format(language=answer_in), seen=see, **terms)


def clean_answer(answer: str) -> str:
    """Return the prompt in a chat model's answer, in one line of at most 3000 characters, or raise ChatError.

    Thinking, an introduction, a "Prompt:" label, code fences, bold type and quotation marks are stripped.
    """
    text = _without_thinking(plain_text(answer)).strip()
    if len(text) > _MOST_AROUND * LONGEST:
        raise _too_long(text)
    before = None
    while text != before:  # wrappings come in any order
        before = text
        for pattern, kept in _WRAPPINGS:
            text = pattern.sub(kept, text).strip()
    text = " ".join(text.split())
    if not any(char.isalnum() for char in text):
        raise ChatError(f"the chat model's answer holds no prompt: {shown(answer[:300])}")
    if len(text) > LONGEST:
        raise _too_long(text)
    return text


def _without_thinking(answer: str) -> str:
    """Return an answer without its thinking, in time proportional to its length."""
    kept: list[str] = []
    thinking = False
    for i, part in enumerate(re.split(r"(</?think(?:ing)?>)", answer, flags=re.IGNORECASE)):
        is_tag = i % 2 == 1
        if is_tag and part[1] != "/":
            thinking = True  # and to the end, if the model runs out of tokens before it closes it
        elif is_tag:
            if not thinking:  # some templates open the thinking themselves
                kept.clear()
            thinking = False
        elif not thinking:
            kept.append(part)
    return "".join(kept)


def _too_long(text: str) -> ChatError:
    return ChatError(
        f"the chat model's answer has {len(text)} characters, a prompt at most {LONGEST} "
        f"(about 120 words were asked for): {shown(text[:300])}…"
    )


_LABEL = r"(?:(?:here is|here['’]s|the|an?|your|extended|rewritten|enhanced|final|new|video) )*prompt"
# What is stripped from around an answer, and what remains.
_WRAPPINGS = [
    (re.compile(r"^[^`]*```\w*\n([^`]*)```[^`]*$"), r"\1"),
    (re.compile(r"^```([^`\n]*)```$"), r"\1"),
    (
        re.compile(
            r"^(?:sure|certainly|of course|okay|here(?: is|['’]s))\b[^\n:.]{0,80}:\s*\n", re.IGNORECASE
        ),
        "",
    ),
    (re.compile(r"^(?:sure|certainly|of course|okay)(?:!|[,.]\s*\n)\s*", re.IGNORECASE), ""),
    (re.compile(rf"^[*#\s]*{_LABEL}\s*(?:\*\*)?\s*[:：]\s*(?:\*\*)?", re.IGNORECASE), ""),  # noqa: RUF001
    (re.compile(r"^[*#\s]*(?:提示词|改写后的?(?:提示词|prompt)?)\s*(?:\*\*)?[:：]\s*(?:\*\*)?"), ""),  # noqa: RUF001
    (re.compile(r"^\*\*([^*]*)\*\*$"), r"\1"),
    *(
        (re.compile(f"^{opening}([^{opening}{closing}]*){closing}$"), r"\1")
        for opening, closing in ('""', "“”", "„“", "«»", "「」", "『』", "``")
    ),
    # An apostrophe inside is no closing quotation mark.
    (re.compile(r"^'((?:[^']|(?<=\w)'(?=\w))*)'$"), r"\1"),
    (re.compile(r"^‘((?:[^‘’]|(?<=\w)’(?=\w))*)’$"), r"\1"),  # noqa: RUF001
]


def _checked_task(task: Task | None, images: int) -> Task:
    tasks: tuple[Task, ...] = get_args(Task)
    if task is None:
        return tasks[images]
    check_choice("task", task, tasks)
    if images and task != tasks[images]:
        raise ValueError(
            f"task={shown(task)} does not suit {images} image(s); task={shown(tasks[images])} does"
        )
    return task


def _images(image: Any, last_image: Any) -> "tuple[Image, ...]":
    if image is None and last_image is not None:
        raise ValueError("last_image must come with image, the first frame; give both, or only the first")
    return tuple(_opened(picture) for picture in (image, last_image) if picture is not None)


def _opened(picture: Any) -> "Image":
    from PIL import Image

    if isinstance(picture, (str, Path)):
        return read_picture("image", picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"an image must be a file or a PIL image, not {type(picture).__name__}")
    return upright_rgb(picture)
