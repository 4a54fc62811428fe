"""repr(pipe): what is loaded and attached, in a few lines; and dir(pipe)."""

import copy
import re

import pytest
import torch

from tests.builders import SMALL, random_pipeline
from tests.checkpoints.lora_writers import make_lora, save
from wan22 import FlowMatchEulerScheduler, WanT2VPipeline, tiny_checkpoint


def lines(pipe):
    """The lines of repr(pipe) by the name at their beginning."""
    first, *others = repr(pipe).splitlines()
    return first, dict(re.fullmatch(r"  (not loaded|\S+) +(.+)", line).groups() for line in others)


def test_a_loaded_pipeline():
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint())
    first, told = lines(pipe)
    assert first == "WanT2VPipeline of tiny-t2v"
    assert told["text_encoder"].startswith("UMT5EncoderModel, bfloat16, 0.197 MB")
    assert told["transformer"].startswith("WanTransformer3DModel, bfloat16 and float32, 3.6 MB")
    assert told["scheduler"] == "FlowMatchUniPCScheduler, shift 3"
    assert told["boundary_ratio"] == "0.875"
    assert told["from"] == str(tiny_checkpoint())
    assert told.keys() & {"LoRAs", "memory", "not loaded"} == set()


def test_what_is_there_is_told(tmp_path):
    pipe = copy.deepcopy(random_pipeline())
    pipe.scheduler = FlowMatchEulerScheduler(shift=4.5)
    model = pipe.any_transformer
    pipe.load_lora_weights(
        save(make_lora(model, 1), tmp_path / "a.safetensors"), "style", strength=(0.5, 0.25)
    )
    pipe.vae.enable_tiling()
    pipe.to(torch.bfloat16)
    pipe.tokenizer = None
    told = lines(pipe)[1]
    assert told["scheduler"] == "FlowMatchEulerScheduler, shift 4.5"
    assert told["vae"].startswith("AutoencoderKLWan, bfloat16")
    assert told["LoRAs"].startswith("style 0.5")
    assert told["tiled"].startswith("min_height 256, min_width 256, stride_height 192")
    assert "tokenizer" in told["not loaded"]
    pipe.vae.disable_tiling()
    pipe.fit(height=32, width=32, num_frames=5)
    assert lines(pipe)[1]["memory"].startswith("planned for 32x32, 5 frames")
    pipe.release()
    pipe.memory.plan_within(None)
    assert lines(pipe)[1]["memory"] == "planned by the next call, for its size"


def test_dir_names_what_there_is():
    pipe = random_pipeline()
    names = dir(pipe)
    for name in names:
        getattr(type(pipe), name, None) or getattr(pipe, name)
    documented = {"from_pretrained", "fit", "free", "stream", "save_pretrained", "load_lora_weights", "to"}
    assert documented | {"transformer", "vae", "enable_model_cpu_offload", "components"} <= set(names)
    assert not [name for name in names if name.startswith("_")]
    assert not {"numpy_to_pil", "enable_xformers_memory_efficient_attention", "pack_weights"} & set(names)


# ---- after free() ----

USES = {
    "call": lambda pipe: pipe("a", **SMALL),
    "encode_prompt": lambda pipe: pipe.encode_prompt("a"),
    "decode": lambda pipe: pipe.decode(torch.zeros(1, 16, 1, 4, 4)),
    "to": lambda pipe: pipe.to("cpu"),
    "fit": lambda pipe: pipe.fit(),
    "quantize": lambda pipe: pipe.quantize("int8"),
    "save": lambda pipe: pipe.save_pretrained("nowhere"),
}


@pytest.fixture(scope="module")
def freed():
    pipe = copy.deepcopy(random_pipeline())  # other tests have the same models
    other = WanT2VPipeline.from_pipe(pipe)
    pipe.free()
    pipe.free()  # again, for nothing
    return pipe, other


@pytest.mark.parametrize("use", USES)
def test_a_freed_pipeline_says_so(use, freed):
    for pipe in freed:
        with pytest.raises(
            RuntimeError, match=r"pipe\.free\(\) has emptied .*transformer.*; load the pipeline"
        ):
            USES[use](pipe)


def test_its_description(freed):
    assert lines(freed[0])[1]["vae"] == "AutoencoderKLWan, freed"


def test_with_other_models_it_runs(freed):
    pipe, other = freed[0], random_pipeline()
    for name, part in other.components.items():
        setattr(pipe, name, part)
    assert pipe("a", seed=1, **SMALL).frames is not None


# ---- devices ----


@pytest.mark.parametrize(
    ("device", "hint"),
    [("x" * 10**5, ""), ("cudaa", "; the nearest is 'cuda'"), ("gpu:0", "; the nearest is 'cuda'")],
)
def test_a_device_that_there_is_not(device, hint):
    for use in (random_pipeline().to, lambda device: random_pipeline().to(device=device)):
        with pytest.raises(
            ValueError, match=rf"must be a device of torch, such as 'cpu' or 'cuda:1'{hint}$"
        ) as error:
            use(device)
        assert len(str(error.value)) < 500 and error.value.__cause__ is None
