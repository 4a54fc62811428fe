"""Every source of a pipeline takes every option: memory, quantisation, ranks, LoRAs, dtypes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.accel.offload.recording import RecordingDevice
from tests.accel.parallel.ranks import on_ranks
from tests.builders import SMALL, latents_of
from tests.checkpoints import writers
from tests.checkpoints.lora_writers import make_lora, save
from tests.golden_data import golden
from tests.pipelines.loading.repositories import FORMS, make_repository, write_official
from wan22 import WanI2VPipeline, WanT2VPipeline, WanTransformer3DModel
from wan22.accel.offload.layout import bytes_of
from wan22.accel.parallel import processes
from wan22.accel.planning.machine import CONTEXT
from wan22.accel.planning.planner import _held
from wan22.accel.quantization.layers import is_quantized
from wan22.checkpoints.deferred import deferred_weights
from wan22.checkpoints.loading import fill
from wan22.checkpoints.quantized_linear import QuantizedLinear
from wan22.pipelines.loading import load
from wan22.pipelines.loading.arguments import lora_arguments
from wan22.pipelines.loading.checkpoint import Wanted
from wan22.pipelines.loading.single_files import SingleFiles

SIZE = {"height": 32, "width": 32, "num_frames": 5}
MODELS = ("text_encoder", "transformer", "transformer_2", "vae")
LORA = "pretrained_model_name_or_path_or_dict"
EXPERTS = {"high": "expert_t2v_high", "low": "expert_t2v_low"}


def write_safetensors(weights, path):
    save_file(weights, path)


def write_gguf(weights, path):
    writers.write_gguf(weights, path, "Q8_0")


WRITERS = {"safetensors": write_safetensors, "pth": torch.save, "gguf": write_gguf, "fp8": writers.comfy_old}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders with the same weights: in both layouts, and the experts in files of each format."""
    root = tmp_path_factory.mktemp("sources")
    official = write_official(root / "official", *FORMS["t2v"][:2])
    WanT2VPipeline.from_pretrained(official).save_pretrained(root / "diffusers")
    for ending, write in WRITERS.items():
        for slot, name in EXPERTS.items():
            write({k: v.clone() for k, v in golden(name).weights.items()}, root / f"{slot}.{ending}")
    return root


@pytest.fixture(params=["diffusers", "official", *WRITERS])
def source(request, sources):
    """Return the checkpoint of a source, and a function that loads its pipeline."""
    if request.param in WRITERS:
        official = sources / "official"
        files = {"vae": official / "Wan2.1_VAE.pth", "tokenizer": official / "google/umt5-xxl"}
        files |= {"text_encoder": official / "models_t5_umt5-xxl-enc-bf16.pth"}
        experts = [sources / f"{slot}.{request.param}" for slot in EXPERTS]
        paths = dict(zip(("transformer", "transformer_2"), experts, strict=True)) | files

        def from_files(**options):
            return WanT2VPipeline.from_single_file(*experts, **files, attention_head_dim=24, **options)

        return SingleFiles(paths), from_files
    folder = sources / request.param
    return load.locate(str(folder), {}), lambda **options: WanT2VPipeline.from_pretrained(folder, **options)


def made_by(pipe, **size):
    """Latents from embeddings: the transformers' text is not as wide as the text encoder's."""
    text = torch.linspace(-1, 1, 4 * 32).view(1, 4, 32)
    return latents_of(pipe, prompt_embeds=text, negative_prompt_embeds=-text, **size)


@pytest.fixture
def no_weights_read(monkeypatch, tiny_preset):
    def refuse(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr("wan22.checkpoints.loading.stored.StoredModel.load", refuse)
    monkeypatch.setattr(WanT2VPipeline, "from_diffusers_folder", refuse)


@pytest.fixture
def device(monkeypatch, tiny_preset):
    for module in ("attached.memory", "loading.load"):
        monkeypatch.setattr(f"wan22.pipelines.{module}.CudaDevice", lambda *_: RecordingDevice())


# ---- memory ----


def test_a_budget_is_refused_before_weights_are_read(source, no_weights_read):
    with pytest.raises(ValueError, match="does not fit into"):
        source[1](memory="1MB")


def test_a_budget_is_refused_before_weights_are_downloaded(sources, tmp_path, monkeypatch, tiny_preset):
    folder = shutil.copytree(sources / "diffusers", tmp_path / "copy")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    make_repository(tmp_path / "cache", "org/wan", {"main": folder})
    monkeypatch.setattr(WanT2VPipeline, "download", lambda *_, **__: pytest.fail("weights are downloaded"))
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    with pytest.raises(ValueError, match="does not fit into"):
        WanT2VPipeline.from_pretrained("org/wan", memory="1MB", **hub)


def test_a_budget_that_fits(source, device):
    pipe = source[1](memory={"vram": "4GB", **SIZE})
    assert pipe.memory_plan.machine.vram == 4e9 - CONTEXT
    assert pipe.memory_plan.size == (32, 32, 5)
    assert set(pipe.memory_plan.placements) == set(MODELS)


def test_the_first_call_makes_the_plan(source, device):
    """For its size, which is not known before; until then a budget is checked for the smallest video."""
    pipe = source[1](memory="4GB")
    assert pipe.memory_plan is None
    with pytest.raises(ValueError, match="the plan moves the models"):
        pipe.to("cuda")
    made_by(pipe, height=48, width=32, num_frames=1)
    assert pipe.memory_plan.size == (32, 48, 1)
    assert pipe.memory_plan.machine.vram == 4e9 - CONTEXT


def test_what_a_budget_may_say(source, no_weights_read):
    with pytest.raises(
        ValueError, match="a key of memory='seconds' must be one of 'disk', 'guided', 'height'"
    ):
        source[1](memory={"vram": "4GB", "seconds": 3})


@pytest.mark.parametrize("dequantize", [False, True])
def test_in_a_budget_nothing_is_converted_before_it_is_used(dequantize, source, device, monkeypatch):
    """Float32 files for bf16; the video is the one that converted weights make, and saves as they do."""
    monkeypatch.setattr(fill, "DEFERRED_SIZE", 1)
    options = {"dtype": torch.bfloat16, "dequantize": dequantize}
    plain, pipe = source[1](**options), source[1](memory="4GB", **options)
    deferred = [weight for name in MODELS for weight in deferred_weights(getattr(pipe, name))]
    held, before = (sum(_held(each, MODELS)[0].values()) for each in (pipe, plain))
    assert deferred and held == before - sum(weight.nbytes for weight in deferred)
    expected = made_by(plain, height=32, width=32)
    assert torch.equal(made_by(pipe, height=32, width=32), expected)
    pipe.release()
    assert torch.equal(made_by(pipe, height=32, width=32), expected)


@pytest.mark.parametrize(
    ("dtype", "dequantize"),
    [(None, False), ({"transformer": torch.bfloat16}, False), (torch.bfloat16, True)],
    ids=["stored", "one in bf16", "expanded in bf16"],
)
def test_the_outline_has_the_bytes_of_what_is_loaded(source, dtype, dequantize):
    checkpoint, from_source = source
    others = {"attention_head_dim": 24} if isinstance(checkpoint, SingleFiles) else {}
    outline = checkpoint.outline(Wanted(dtype=dtype, dequantize=dequantize, others=others))
    pipe = from_source(dtype=dtype, dequantize=dequantize)
    assert set(outline) == set(MODELS)
    for name, model in outline.items():
        loaded = getattr(pipe, name)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert bytes_of(model) == bytes_of(loaded)
        assert {n: p.dtype for n, p in model.named_parameters()} == {
            n: p.dtype for n, p in loaded.named_parameters()
        }


@pytest.mark.parametrize("pipeline", [WanT2VPipeline, WanI2VPipeline])
def test_a_budget_for_either_task_of_ti2v(pipeline, tmp_path, device):
    folder = write_official(tmp_path / "official", *FORMS["ti2v"][:2])
    assert pipeline.from_pretrained(folder, memory={"vram": "8GB", **SIZE}).memory_plan is not None


def test_a_repository_that_is_not_here_is_outlined_as_its_release_is_stored(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": 1536, "in_dim": 16}
    (folder / "config.json").write_text(json.dumps(config))
    make_repository(tmp_path / "cache", "org/wan", {"main": folder})
    checkpoint = load.locate("org/wan", {"cache_dir": tmp_path / "cache", "local_files_only": True})
    outline = checkpoint.outline(Wanted())
    parameters = sum(p.numel() for p in outline["transformer"].parameters())
    assert parameters == pytest.approx(1.42e9, rel=0.01)
    assert bytes_of(outline["transformer"]) == 4 * parameters
    half = checkpoint.outline(Wanted(dtype=torch.bfloat16))
    assert bytes_of(half["transformer"]) == pytest.approx(2 * parameters, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_that_are_not_here_are_outlined_by_their_index(dtype, sources, tmp_path):
    folder = shutil.copytree(sources / "diffusers", tmp_path / "copy")
    model = WanTransformer3DModel.from_pretrained(folder / "transformer")
    shutil.rmtree(folder / "transformer")
    model.to(dtype).save_pretrained(folder / "transformer", max_shard_size="50KB")
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    outline = load.locate(str(folder), {}).outline(Wanted())
    assert outline["transformer"].dtype == dtype


# ---- the other options ----


def test_quantised_transformers(source):
    pipe = source[1](quantize="int8", dequantize=True)
    assert is_quantized(pipe.transformer) and is_quantized(pipe.transformer_2)
    assert not is_quantized(pipe.text_encoder)


def test_quantised_weights_are_expanded(source, sources):
    expected = WanTransformer3DModel.from_pretrained(sources / "official/high_noise_model")
    pipe = source[1](dequantize=True, dtype=torch.float32)
    assert not any(isinstance(module, QuantizedLinear) for module in pipe.transformer.modules())
    torch.testing.assert_close(
        pipe.transformer.proj_out.weight, expected.proj_out.weight, atol=0.05, rtol=0.05
    )


def test_quantised_weights_in_the_diffusers_layout(sources, tmp_path):
    folder = shutil.copytree(sources / "diffusers", tmp_path / "copy")
    weights = WanTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    values = writers.comfy_old({k: v.clone() for k, v in weights.items()}, file)
    stored = WanT2VPipeline.from_pretrained(folder).transformer
    assert any(isinstance(module, QuantizedLinear) for module in stored.modules())
    pipe = WanT2VPipeline.from_pretrained(folder, dequantize=True, dtype=torch.float32)
    assert {n: torch.equal(v, values[n]) for n, v in pipe.transformer.state_dict().items()} == dict.fromkeys(
        values, True
    )


def test_loras(source, tmp_path):
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, ffn_dim=64, num_layers=1, text_dim=48
    )
    first, second = (save(make_lora(model, seed), tmp_path / f"{seed}.safetensors") for seed in (1, 2))
    loras = [first, {LORA: str(second), "strength": 0.5, "adapter_name": "weaker"}]
    pipe = source[1](loras=loras)
    assert pipe.get_active_adapters() == ["default_0", "weaker"]


def test_one_process_goes_to_its_device(source, monkeypatch):
    monkeypatch.setattr(processes, "own_device", lambda: torch.device("meta"))
    pipe = source[1](parallel="auto")
    assert all(parameter.is_meta for name in MODELS for parameter in getattr(pipe, name).parameters())
    with pytest.raises(ValueError, match="must be 'auto', or a dict with some of ring, ulysses"):
        source[1](parallel=2)
    with pytest.raises(
        ValueError, match=r"a key of parallel='rings' must be one of .*; the nearest is 'ring'"
    ):
        source[1](parallel={"rings": 2})


def shared(rank, folder, lora):
    """Single files on two ranks, with a LoRA, converted to bf16: whether the video is as on one."""
    root = Path(folder)
    files = [root / "high.safetensors", root / "low.pth"]
    parts = {"vae": root / "official/Wan2.1_VAE.pth", "tokenizer": root / "official/google/umt5-xxl"}
    parts |= {"text_encoder": root / "official/models_t5_umt5-xxl-enc-bf16.pth", "loras": lora}
    parts |= {"dtype": torch.bfloat16, "attention_head_dim": 24}
    _, _, tensors = golden("pipe_t2v_unipc")
    names = {"prompt_embeds": "context", "negative_prompt_embeds": "context_null"}
    call = SMALL | {"seed": 1, "output_type": "latent"}
    call |= {argument: tensors[name][None] for argument, name in names.items()}
    expected = WanT2VPipeline.from_single_file(*files, **parts)(**call).frames
    monkeypatch = pytest.MonkeyPatch()
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    pipe = WanT2VPipeline.from_single_file(*files, **parts, parallel={"cfg": 2})
    assert pipe.parallel.layout.cfg == 2
    return torch.equal(pipe(**call).frames, expected)


def test_ranks_share_single_files(sources, tmp_path):
    model = WanTransformer3DModel.from_pretrained(sources / "diffusers/transformer")
    lora = save(make_lora(model, 1), tmp_path / "lora.safetensors")
    assert on_ranks(2, shared, str(sources), str(lora)) == [True, True]


LOAD = WanT2VPipeline.load_lora_weights


def test_forms_of_loras(tmp_path):
    table = {"blocks.0.lora_A.weight": torch.zeros(1)}
    arguments = {LORA: table, "strength": 0.5}
    assert lora_arguments((), LOAD) == []
    assert lora_arguments("a.safetensors", LOAD) == [{LORA: "a.safetensors"}]
    assert lora_arguments(tmp_path, LOAD) == [{LORA: tmp_path}]
    assert lora_arguments(table, LOAD) == [{LORA: table}]
    assert lora_arguments(arguments, LOAD) == [arguments]
    assert lora_arguments(["org/name", table, arguments], LOAD) == [
        {LORA: "org/name"}, {LORA: table}, arguments
    ]  # fmt: skip
    with pytest.raises(TypeError, match="has no argument strenght; the nearest is strength"):
        lora_arguments([{LORA: table, "strenght": 1}], LOAD)
