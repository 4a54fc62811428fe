"""Settings of quantisation: texts, what they mean, and what a recipe tells of them."""

import pytest

from wan22 import Quantization
from wan22.accel.quantization.settings import from_recipe, in_words

TEXTS = {
    "fp8": Quantization("fp8"),
    "int8:low": Quantization("int8", only="low"),
    "fp8_dynamic:high:keep=1": Quantization("fp8_dynamic", only="transformer", keep_blocks=1),
    "fp8:keep=1,2": Quantization("fp8", keep_blocks=[1, 2]),
    "int8:low:keep=0,3:block=128": Quantization("int8", 128, "transformer_2", (0, 3)),
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_short_for_settings(text):
    settings = TEXTS[text]
    assert Quantization.of(text) == Quantization.of(settings) == settings
    assert str(settings) == text
    assert Quantization.of(text, only="high").only == "high"
    assert Quantization.of(text, block=None) == settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantization.of("fp9"), "method 'fp9' must be fp8, fp8_dynamic, int8 or"),
        (lambda: Quantization.of("fp8:lo"), "quantize='fp8:lo': lo is not known there; it is such as 'fp8'"),
        (lambda: Quantization.of("fp8:low:high"), "high is not known there"),
        (lambda: Quantization.of("fp8:keep="), "quantize='fp8:keep=':  is no number"),
        (lambda: Quantization.of("fp8:keep=1,2,3"), "must be a number, or two: of first and of last"),
        (lambda: Quantization.of("int8:block=1,2"), "block is one number"),
        (lambda: Quantization("fp8", keep_blocks=-1), "keep_blocks=-1 must be an int, at least 0"),
        (lambda: Quantization("fp8", keep_blocks=(1, 1.5)), "keep_blocks=1.5 must be an int"),
        (lambda: Quantization("fp8", keep_blocks="1"), "keep_blocks='1' must be an int"),
        (lambda: Quantization("fp8", only="both"), "only='both' must be one of 'high', 'low', 'transformer'"),
        (lambda: Quantization("fp8_dynamic", block=16), "one scale for all inputs"),
        (lambda: Quantization(object(), block=16), "torchao's configurations have their own"),
    ],
)
def test_what_is_no_setting_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_which_transformers_are_meant():
    both = ["transformer", "transformer_2"]
    assert Quantization("fp8").slots(both) == both
    assert Quantization("fp8", only="high").slots(both) == ["transformer"]
    assert Quantization("fp8", only="low").slots(both) == ["transformer_2"]
    with pytest.raises(ValueError, match="only='low': transformer_2 is not loaded"):
        Quantization("fp8", only="low").slots(["transformer"])


def test_numbers_of_blocks_in_words():
    assert in_words([]) == "" and in_words([0]) == "0"
    assert in_words([0, 1, 2, 38, 39]) == "0-2, 38-39"


@pytest.mark.parametrize(
    ("tables", "experts", "text"),
    [
        ({"transformer": {"fp8": 9}, "transformer_2": {"fp8": 9}}, 2, "fp8"),
        ({"transformer": {"fp8": 9}}, 2, "fp8:high"),
        ({"transformer": {"fp8": 9}, "text_encoder": {"Q8_0": 3}}, 1, "fp8"),
        ({"transformer_2": {"int8": 7, "blocks kept": "0-1, 39"}}, 2, "int8:low:keep=2,1"),
        ({"transformer": {"int8": 7, "blocks kept": "38-39"}}, 1, "int8:keep=0,2"),
        ({"transformer": {"fp8": 9}, "transformer_2": {"int8": 9}}, 2, None),
        ({"transformer": {"fp8": 9, "int8": 1}}, 1, None),
        ({"transformer": {"Q8_0": 9}}, 1, None),
        ({"transformer": {"fp8": 9, "blocks kept": "0, 2, 9"}}, 1, None),
        ({"transformer": {"fp8": 9, "blocks kept": "x"}}, 1, None),
        ({"transformer": 3}, 1, None),
        (("transformer",), 1, None),
        (None, 1, None),
    ],
)
def test_what_a_recipe_tells(tables, experts, text):
    found = from_recipe(tables, experts)
    assert (found if found is None else str(found)) == text
