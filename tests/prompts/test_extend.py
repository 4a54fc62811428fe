"""What the chat model is told, and what is made of its answer."""

import inspect
import subprocess
import sys
import time

import pytest
from PIL import Image

import wan22.prompts
from tests.prompts.stubs import Remembering
from wan22.prompts import ChatError, ChatModel, TextPrompt, extend_prompt, multi_shot
from wan22.prompts.extend import LONGEST, clean_answer, system_prompt
from wan22.prompts.vocabulary import VOCABULARY

TASKS = ("t2v", "i2v", "flf2v")
RED = Image.new("RGB", (8, 4), "red")
BLUE = Image.new("RGB", (8, 4), "blue")


def asked(prompt="a fox", **settings):
    """Return the system's and the user's message."""
    chat = Remembering()
    assert extend_prompt(prompt, chat, **settings) == "A fox."
    system, user = chat.messages
    assert (system.role, user.role) == ("system", "user")
    assert system.images == ()
    return system.text, user


def test_the_prompt_is_what_the_user_says():
    assert asked(" a fox ")[1].text == "a fox"
    prompt = TextPrompt("a fox", light="soft light")
    assert asked(prompt)[1].text == str(prompt)
    assert "Shot 2 [2-4s] B." in asked(multi_shot("a story", [(2, "a"), (2, "b")]))[1].text


def test_the_seed_reaches_the_chat_model():
    chat = Remembering()
    extend_prompt("a fox", chat, seed=7)
    assert chat.seed == 7
    extend_prompt("a fox", chat)
    assert chat.seed is None


def test_the_images_choose_the_task():
    text, user = asked()
    assert (text, user.images) == (system_prompt("t2v"), ())
    text, user = asked(image=RED)
    assert text == system_prompt("i2v", seen=True)
    assert [image.getpixel((0, 0)) for image in user.images] == [(255, 0, 0)]
    text, user = asked(image=RED, last_image=BLUE)
    assert text == system_prompt("flf2v", seen=True)
    assert [image.getpixel((0, 0)) for image in user.images] == [(255, 0, 0), (0, 0, 255)]


def test_a_task_without_its_images():
    for task in TASKS:
        assert asked(task=task)[0] == system_prompt(task)
    assert "which you cannot see" in system_prompt("i2v")
    assert "which you see" in system_prompt("i2v", seen=True)


def test_image_files(tmp_path):
    RED.save(tmp_path / "red.png")
    for path in (tmp_path / "red.png", str(tmp_path / "red.png")):
        [image] = asked(image=path)[1].images
        assert (image.mode, image.size) == ("RGB", (8, 4))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    RED.save(tmp_path / "turned.jpg", exif=turned)
    assert asked(image=tmp_path / "turned.jpg")[1].images[0].size == (4, 8)


def test_every_task_has_its_own_instructions():
    texts = [system_prompt(task) for task in TASKS]
    assert len(set(texts)) == 3
    for text in texts:
        assert "{" not in text
        for rule in (
            "Keep every fact",
            "80 to 120 words",
            "Return the prompt alone",
            "language of the user's text",
        ):
            assert rule in text
        assert ", ".join(VOCABULARY["camera_movement"]) in text
    assert ", ".join(VOCABULARY["light_source"]) in texts[0]
    assert "last frame" in texts[2]


@pytest.mark.parametrize("task", TASKS)
def test_another_language(task):
    text = asked(task=task, language="French {x}")[0]
    assert "Write in French {x}." in text
    assert "language of the user's text" not in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": " "}, "prompt=' ' must say at least what is seen"),
        ({"task": "v2v"}, "task='v2v' must be one of 't2v', 'i2v', 'flf2v'"),
        ({"task": "t2v", "image": RED}, "task='t2v' does not suit 1 image.s.; task='i2v' does"),
        (
            {"task": "i2v", "image": RED, "last_image": BLUE},
            "task='i2v' does not suit 2 image.s.; task='flf2v'",
        ),
        ({"last_image": BLUE}, "last_image must come with image"),
        ({"image": 3}, "an image must be a file or a PIL image, not int"),
    ],
)
def test_refused(settings, message):
    chat = Remembering()
    with pytest.raises(ValueError, match=message):
        extend_prompt(**{"prompt": "a fox", "chat": chat, **settings})
    assert chat.messages is None


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no-such\.png"):
        extend_prompt("a fox", Remembering(), image="no-such.png")


FOX = 'A fox says "hello" and trots: it\'s dawn.'


@pytest.mark.parametrize(
    "answer",
    [
        FOX,
        f"\n  {FOX}\n",
        FOX.replace(" ", "\n\n", 1),
        f"“{FOX}”",
        f"'{FOX}'",
        f"‘{FOX}’",  # noqa: RUF001
        f"「{FOX}」",
        f"«{FOX}»",
        f"**{FOX}**",
        f"`{FOX}`",
        f"```\n{FOX}\n```",
        f"```text\n{FOX}```",
        f"```{FOX}```",
        f"Here you are.\n\n```\n{FOX}\n```\nTell me if it should be longer!",
        f"Prompt: {FOX}",
        f"prompt：{FOX}",  # noqa: RUF001
        f"**Extended prompt:** {FOX}",
        f"**Extended Prompt**: {FOX}",
        f"## Prompt:\n{FOX}",
        f"提示词：{FOX}",  # noqa: RUF001
        f"Here is the extended prompt:\n\n{FOX}",
        f"Here’s your new video prompt: {FOX}",
        f"Sure! Here is the prompt:\n{FOX}",
        f"Sure! Here is the prompt: {FOX}",
        f"Okay, this is what I would write:\n“{FOX}”",
        f"Certainly.\n{FOX}",
        f"<think>a wolf? no.\nPrompt: wolf</think>\n{FOX}",
        f"<thinking>wolf</thinking>{FOX}",
        f"the template opened it</think>\n\n{FOX}",
        f"<think>one</think><think>two</think>{FOX}",
        f"{FOX}<think>was that good?",
        f"<think>hm</think>Sure! **Prompt:** ```\n“{FOX}”\n```",
    ],
)
def test_answers_are_cleaned(answer):
    assert clean_answer(answer) == FOX
    assert extend_prompt("a fox", Remembering(answer)) == FOX


def test_quotation_marks_around_all():
    assert clean_answer('"A fox trots."') == "A fox trots."
    assert clean_answer("„A fox trots.“") == "A fox trots."


@pytest.mark.parametrize(
    "answer",
    [
        '"Hello," says a fox, "goodbye"',
        "'Tis dawn, and the fox's tail hangs.",
        "Here a fox sleeps. There a hare runs.",
        "A sign reads: Prompt: yes.",
        "Sure-footed goats climb: one leads.",
        "A man prompts: the dog sits.",
        "2 * 3 foxes",
        "「狐」と「兎」",
        "A fox <thinks> of a hare.",
    ],
)
def test_what_belongs_to_a_prompt_stays(answer):
    assert clean_answer(answer) == answer


@pytest.mark.parametrize("answer", [FOX, '"A"', "Prompt: Prompt: a", "**“a”**", "```\nPrompt: 'a'\n```"])
def test_a_clean_answer_stays_as_it_is(answer):
    assert clean_answer(clean_answer(answer)) == clean_answer(answer)


@pytest.mark.parametrize(
    "answer", ["", " \n", '""', "```\n```", "<think>long thoughts", "<think>a</think>", "Prompt:", "..."]
)
def test_an_empty_answer(answer):
    with pytest.raises(ChatError) as caught:
        clean_answer(answer)
    assert str(caught.value) == f"the chat model's answer holds no prompt: {answer!r}"


def test_an_endless_answer():
    assert clean_answer("x" * LONGEST) == "x" * LONGEST
    with pytest.raises(ChatError, match=r"answer has 3001 characters, a prompt at most 3000 .*: 'xx"):
        clean_answer("x" * (LONGEST + 1))
    assert clean_answer(f"<think>{'x ' * LONGEST}</think>A fox.") == "A fox."


@pytest.mark.parametrize("text", ["<think>" * 100_000, "a</think>" * 100_000, "the prompt " * 100_000 + ":"])
def test_a_long_answer_is_cleaned_or_refused_at_once(text):
    start = time.monotonic()
    with pytest.raises(ChatError, match=r"holds no prompt|characters, a prompt at most"):
        clean_answer(text)
    assert time.monotonic() - start < 2


def test_control_characters_are_no_part_of_a_prompt():
    assert clean_answer("A\x00 \x1b[31mred\x1b[0m fox\x07.\x1b") == "A red fox."


def test_importing_loads_nothing():
    code = "import sys, wan22.prompts as p; [getattr(p, n) for n in p.__all__]; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "wan22.prompts.extend" in result.stdout.split()
    assert not {"torch", "transformers", "PIL", "numpy", "diffusers"} & set(result.stdout.split())


def test_public_names():
    for name in set(wan22.prompts.__all__) - {"VOCABULARY"}:
        assert inspect.getdoc(getattr(wan22.prompts, name))
    assert ChatModel.__call__.__doc__
