"""Captions and labels: what videos were made of, in words."""

from dataclasses import replace

from tests.video.test_result import recipe
from wan22.video.labels import caption, labels, shared_caption
from wan22.video.recipe import UsedLora


def test_a_caption_has_prompt_seed_size_steps_and_time():
    told = caption(replace(recipe(prompt=["a red\nkite"]), num_inference_steps=20), 12.34)
    made = "made in 12.3\N{NO-BREAK SPACE}s"
    assert told == f"a red kite\nseed 0, 64x48, 9 frames at 12 fps (0.8 s), 20 steps, test, {made}"
    assert caption(recipe(prompt=["a red kite"]), prompt=False).startswith("seed 0, 64x48")
    assert caption(recipe(prompt=[None])).startswith("seed 0"), "embeddings were given"
    assert "\x1b" not in caption(recipe(prompt=["\x1b[31m"]))


def test_labels_say_what_differs():
    plain = recipe()
    assert labels([recipe(seed=[s]) for s in (1, 2)]) == ["seed 1", "seed 2"]
    assert labels([plain, plain]) == ["seed 0", "seed 0"]
    others = {
        "20 steps": replace(plain, num_inference_steps=20),
        "int8 quantised": replace(plain, changes={"quantized": {"transformer": {"int8": 60}}}),
        "accelerated": replace(plain, changes={"accelerated": True}),
        "attention math": replace(plain, changes={"attention": ("math",)}),
        "step cache FirstBlockCacheConfig transformer threshold 0.2": replace(
            plain, changes={"step_cache": {"FirstBlockCacheConfig": {"transformer": {"threshold": "0.2"}}}}
        ),
        "LoRA style at 1/0.5": replace(
            plain, loras=(UsedLora("style", None, {"transformer": 1.0, "transformer_2": 0.5}),)
        ),
        "64x64": replace(plain, height=64),
        "distilled lightning-4": recipe(distilled="lightning-4"),
        "guidance 2.5": recipe(guidance_scale=2.5),
        "guidance 3, 2": recipe(guidance_scale=[3.0, 2.0]),
        "apg guidance (eta 0.5)": recipe(guidance={"name": "apg", "eta": 0.5}),
        "gated guidance (guider name tcfg)": recipe(guidance={"name": "gated", "guider": {"name": "tcfg"}}),
        "guidance interval 0.2, 0.9": recipe(guidance_interval=[0.2, 0.9]),
        "Euler": replace(plain, scheduler="Euler"),
        "vae float32": replace(plain, dtypes={"vae": "float32"}),
    }
    absent = ["2 steps", "not quantised", "not accelerated", "native attention", "no step cache", "no LoRA"]
    absent += ["64x48", "not distilled", "guidance 1", "guidance 1"]
    absent += ["plain guidance", "plain guidance", "guidance in all steps", "S", "no dtypes"]
    for (label, other), without in zip(others.items(), absent, strict=True):
        assert labels([plain, other]) == [without, label]


def test_labels_of_experts_and_blocks_that_are_not_quantised():
    plain = replace(recipe(), boundary_ratio=0.875)
    both = {"transformer": {"fp8": 60}, "transformer_2": {"fp8": 60}}
    told = {
        "fp8 quantised": both,
        "fp8 but blocks 0, 39 quantised": {slot: {"fp8": 57, "blocks kept": "0, 39"} for slot in both},
        "quantised: transformer fp8": {"transformer": {"fp8": 60}},
        "quantised: transformer_2 fp8": {"transformer_2": {"fp8": 60}},
        "quantised: transformer fp8, transformer_2 int8": both | {"transformer_2": {"int8": 60}},
    }
    recipes = [replace(plain, changes={"quantized": tables}) for tables in told.values()]
    assert labels([*recipes, plain]) == [*told, "not quantised"]
    assert labels([replace(plain, changes={"quantized": {"transformer": 3}}), plain])[1] == "not quantised"


def test_prompts_that_differ_come_first_and_pictures_have_marks():
    told = labels([recipe(prompt=["a cat"], seed=[1]), recipe(prompt=["a dog"], seed=[2])], [1.0, 2.0])
    assert told == [f"a {x}\nseed {i}, made in {i}.0\N{NO-BREAK SPACE}s" for i, x in ((1, "cat"), (2, "dog"))]
    pictures = [replace(recipe(image=["a.png"]), pictures={"image": (f"sha256:{i}23456789",)}) for i in "01"]
    assert labels(pictures) == ["image a.png (02345678)", "image a.png (12345678)"]


def test_what_all_share():
    several = [recipe(seed=[1]), recipe(seed=[2])]
    assert shared_caption(several) == "a\n64x48, 9 frames at 12 fps (0.8 s), 2 steps, test"
    assert not shared_caption(several, prompt=False).startswith("a")
    assert not shared_caption([recipe(), recipe(prompt=["b"])]).startswith("a")
