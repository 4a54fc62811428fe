"""The converter: any layout to any other, tensor by tensor, resumed, verified, or refused by name."""

import json
import logging
import os
import re
import runpy
import shutil
from fnmatch import fnmatch
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from tests.builders import golden_text_encoder, random_i2v_pipeline, random_transformer
from tests.checkpoints import writers
from tests.checkpoints.loading.test_models import FORMS as FILE_FORMS
from tests.checkpoints.loading.test_models import official  # noqa: F401
from tests.checkpoints.loading.test_text_encoder import gguf_name, tokens
from tests.golden_data import golden
from tests.official_keys import transformer_state_dict
from tests.official_t5_keys import t5_state_dict
from tests.official_vae_keys import vae_state_dict
from tests.pipelines.loading.repositories import FORMS, error_to_golden, write_official
from wan22 import FlowMatchUniPCScheduler, WanI2VPipeline, tiny_checkpoint
from wan22.checkpoints.converting import convert as module
from wan22.checkpoints.converting import writing
from wan22.checkpoints.converting.convert import convert, plan
from wan22.checkpoints.converting.plan import OutputTensor
from wan22.checkpoints.files.safetensors import read_header

TRANSFORMERS = ("expert_t2v_high", "dit_t2v_hd128", "dit_t2v_hd32", "dit_i2v_hd32", "dit_ti2v_hd24")
HEAD_DIMS = {"expert_t2v_high": 24, "dit_t2v_hd32": 32, "dit_i2v_hd32": 32, "dit_ti2v_hd24": 24}
RENAMED = {name: transformer_state_dict for name in TRANSFORMERS} | {
    "vae21": vae_state_dict,
    "vae22": vae_state_dict,
    "t5": t5_state_dict,
}


def read_json(path):
    return json.loads(path.read_text())


def read(folder):
    """Every tensor of a model's file or folder, read without the library."""
    folder = Path(folder)
    files = (
        [folder]
        if folder.is_file()
        else sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pth"))
    )
    found = {}
    for file in files:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def assert_identical(found, expected):
    """The same names, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert (
            found[name].numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()
            if (tensor.dtype != torch.bfloat16)
            else torch.equal(found[name].view(torch.int16), tensor.view(torch.int16))
        ), name


def untouched(folder, name="out"):
    """Whether nothing of a conversion is there."""
    return not list(folder.glob(f"{name}*"))


@pytest.fixture(scope="module", params=FORMS)
def form(request, tmp_path_factory):
    """An official repository, and it in the Diffusers layout, in shards."""
    folder = tmp_path_factory.mktemp(request.param)
    transformers, vae, *_ = FORMS[request.param]
    write_official(folder / "official", transformers, vae)
    convert(folder / "official", folder / "diffusers", "diffusers", shard_size="100KB")
    return folder, request.param


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2v") / "official"
    return write_official(folder, *FORMS["t2v"][:2])


# ---- repositories ----


def test_a_repository_of_the_hub(t2v, tmp_path, monkeypatch):
    asked = []

    def download(name, ignore_patterns):
        asked.append(name)
        assert not any(
            fnmatch(str(p.relative_to(t2v)), x)
            for p in t2v.rglob("*.*")
            for x in ignore_patterns
            if p.name != "README.md"
        )
        return str(t2v)

    monkeypatch.setattr(module, "snapshot_download", download)
    convert("org/name", tmp_path / "out", "diffusers")
    assert asked == ["org/name"]
    convert(t2v, tmp_path / "other", "diffusers")
    for path in (tmp_path / "other").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "other")).read_bytes()
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*a repository's name is like org/name"):
        convert("./org/name", tmp_path / "more", "diffusers")


def test_official_to_diffusers_and_back_is_identical(form, tmp_path):
    folder, name = form
    convert(folder / "diffusers", tmp_path / "back", "official", shard_size="90KB")
    places = ["high_noise_model", "low_noise_model"] if name in ("t2v", "i2v") else ["."]
    for place in places:
        before, after = folder / "official" / place, tmp_path / "back" / place
        tensors = {n: t for file in sorted(before.glob("*.safetensors")) for n, t in load_file(file).items()}
        shards = sorted(after.glob("*.safetensors"))
        assert len(shards) > 1
        assert_identical({n: t for file in shards for n, t in load_file(file).items()}, tensors)
        config, known = read_json(after / "config.json"), read_json(before / "config.json")
        assert known.items() <= config.items()
        assert {"ffn_dim", "freq_dim", "in_dim", "out_dim", "num_layers", "text_len"} <= config.keys()
        assert config["text_len"] == 512
    vae = "Wan2.2_VAE.pth" if name == "ti2v" else "Wan2.1_VAE.pth"
    for file in (vae, "models_t5_umt5-xxl-enc-bf16.pth"):
        assert_identical(read(tmp_path / "back" / file), read(folder / "official" / file))
    for file in (folder / "official/google/umt5-xxl").iterdir():
        assert (tmp_path / "back/google/umt5-xxl" / file.name).read_bytes() == file.read_bytes()
    written = {p.name for p in (tmp_path / "back").iterdir() if not p.name.startswith("diffusion_pytorch")}
    transformer = set(places) if len(places) == 2 else {"config.json"}
    assert written == {vae, "models_t5_umt5-xxl-enc-bf16.pth", "google"} | transformer


def test_plain_diffusers_loads_the_result(form):
    folder, name = form
    transformers, vae, ours, boundary, shift = FORMS[name]
    cls = diffusers.WanImageToVideoPipeline if ours is WanI2VPipeline else diffusers.WanPipeline
    pipe = cls.from_pretrained(folder / "diffusers")
    assert pipe.config.boundary_ratio == boundary
    assert bool(pipe.config.expand_timesteps) == (vae == "vae22")
    assert type(pipe.scheduler) is diffusers.UniPCMultistepScheduler
    assert pipe.scheduler.config.flow_shift == shift
    for slot, weights in zip(("transformer", "transformer_2"), transformers, strict=False):
        model = getattr(pipe, slot)
        assert_same_values(model.state_dict(), transformer_state_dict(golden(weights).weights))
        assert model.config.attention_head_dim == HEAD_DIMS.get(weights, 24 if "t2v" in weights else 32)
    assert (pipe.transformer_2 is None) == (len(transformers) == 1)
    assert_same_values(pipe.vae.state_dict(), vae_state_dict(golden(vae).weights))
    assert_same_values(pipe.text_encoder.state_dict(), t5_state_dict(golden("t5").weights))
    assert pipe.tokenizer("a b")["input_ids"][-1] == 1


def assert_same_values(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name


def test_each_model_of_the_result_loads_by_itself(form):
    place = form[0] / "diffusers"
    diffusers.WanTransformer3DModel.from_pretrained(place, subfolder="transformer")
    diffusers.AutoencoderKLWan.from_pretrained(place, subfolder="vae")
    encoder = UMT5EncoderModel.from_pretrained(place, subfolder="text_encoder")
    assert torch.equal(tokens(encoder.eval()), tokens(golden_text_encoder()))


@pytest.mark.parametrize("name", ["t2v", "ti2v"])
def test_our_pipeline_gives_the_official_numbers_from_the_result(name, tmp_path):
    transformers, vae, pipeline, *_ = FORMS[name]
    write_official(tmp_path / "official", transformers, vae)
    convert(tmp_path / "official", tmp_path / "out", "diffusers")
    pipe = pipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert error_to_golden(pipe, {"t2v": "pipe_t2v_unipc", "ti2v": "pipe_ti2v_text"}[name]) <= 5e-6


def test_the_scheduler_is_what_ours_saves(form, tmp_path):
    folder, name = form
    FlowMatchUniPCScheduler(shift=FORMS[name][4]).save_pretrained(tmp_path)
    saved, written = (
        read_json(p / "scheduler_config.json") for p in (tmp_path, folder / "diffusers/scheduler")
    )
    assert saved.keys() <= written.keys()
    # None, False and [] all mean "off".
    del saved["_diffusers_version"]  # which tells who wrote it
    assert {k: written[k] or None for k in saved} == {k: v or None for k, v in saved.items()}
    ours = FlowMatchUniPCScheduler.from_pretrained(folder / "diffusers/scheduler")
    assert ours.config.shift == FORMS[name][4]


def test_single_files_of_a_repository_and_back(form, tmp_path):
    folder, name = form
    convert(folder / "diffusers", tmp_path / "single", "single-file")
    transformers, vae, *_ = FORMS[name]
    names = ["high_noise_model", "low_noise_model"] if len(transformers) == 2 else ["transformer"]
    files = {p.name for p in (tmp_path / "single").iterdir()}
    assert files == {f"{n}.safetensors" for n in (*names, "vae", "text_encoder")} | {"tokenizer"}
    for file, weights in zip((*names, "vae", "text_encoder"), (*transformers, vae, "t5"), strict=True):
        assert_identical(read(tmp_path / f"single/{file}.safetensors"), golden(weights).weights)
    head_dim = 32 if name in ("i2v", "2.1") else 24
    convert(tmp_path / "single", tmp_path / "back", "diffusers", attention_head_dim=head_dim)
    for place in ("transformer", "vae", "text_encoder"):
        assert_identical(read(tmp_path / "back" / place), read(folder / "diffusers" / place))
    assert read_json(tmp_path / "back/model_index.json") == read_json(folder / "diffusers/model_index.json")


def test_what_files_hold_is_told_from_their_tensors(tmp_path):
    """Names that say something else, each file of another format."""
    source = tmp_path / "source"
    source.mkdir()
    high = writers.comfy_old(
        {k: v.clone() for k, v in golden("expert_t2v_high").weights.items()}, source / "vae_high.safetensors"
    )
    torch.save(
        {f"model.diffusion_model.{n}": t for n, t in golden("expert_t2v_low").weights.items()},
        source / "flow_low.pth",
    )
    save_file(golden("vae21").weights, source / "umt5.safetensors")
    writers.write_gguf(
        {gguf_name(n): t for n, t in golden("t5").weights.items()},
        source / "Wan2.1_VAE.gguf",
        "F16",
        "t5encoder",
    )
    shutil.copytree(tiny_checkpoint() / "tokenizer", source / "tokenizer")
    convert(source, tmp_path / "out", "diffusers", "fp32", attention_head_dim=24, verify=True)
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path / "out")
    assert_same_values(pipe.transformer.state_dict(), transformer_state_dict(high))
    assert_same_values(
        pipe.transformer_2.state_dict(), transformer_state_dict(golden("expert_t2v_low").weights)
    )
    assert_same_values(pipe.vae.state_dict(), vae_state_dict(golden("vae21").weights))
    assert_same_values(pipe.text_encoder.state_dict(), t5_state_dict(golden("t5").weights))


def test_settings_of_a_diffusers_repository_stay(form, tmp_path):
    """They are somebody's choice, where only the dtype changes."""
    folder = shutil.copytree(form[0] / "diffusers", tmp_path / "source")
    channels = read_json(folder / "vae/config.json")["z_dim"]
    for file, changes in (
        ("model_index.json", {"boundary_ratio": 0.7, "_wan22_version": "1"}),
        ("scheduler/scheduler_config.json", {"flow_shift": 7.5}),
        ("vae/config.json", {"latents_mean": [0.5] * channels}),
    ):
        (folder / file).write_text(json.dumps(read_json(folder / file) | changes))
    convert(folder, tmp_path / "out", "diffusers", "bf16")
    for file in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "transformer/config.json",
    ):
        assert read_json(tmp_path / "out" / file) == read_json(folder / file), file
    assert read_json(tmp_path / "out/text_encoder/config.json")["dtype"] == "bfloat16"
    assert UMT5EncoderModel.from_pretrained(tmp_path / "out/text_encoder").dtype == torch.bfloat16


def test_settings_that_a_layout_does_not_keep_are_named(tmp_path, caplog):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "source")
    for file, changes in (
        ("model_index.json", {"boundary_ratio": 0.7}),
        ("scheduler/scheduler_config.json", {"flow_shift": 7.5}),
        ("transformer/config.json", {"eps": 1e-5}),
    ):
        (folder / file).write_text(json.dumps(read_json(folder / file) | changes))
    with caplog.at_level(logging.WARNING):
        convert(folder, tmp_path / "official", "official")
    said = "\n".join(caplog.messages)
    assert "does not keep latents_mean, latents_std;" in said
    assert "does not keep boundary_ratio 0.7; loaders take tiny-t2v's 0.875" in said
    assert "does not keep flow_shift 7.5; loaders take tiny-t2v's 3.0" in said
    assert "eps" not in said
    assert read_json(tmp_path / "official/high_noise_model/config.json")["eps"] == 1e-5
    convert(tmp_path / "official/high_noise_model", tmp_path / "model", "diffusers")
    assert read_json(tmp_path / "model/config.json")["eps"] == 1e-5
    caplog.clear()
    convert(folder / "transformer", tmp_path / "w.safetensors", "single-file")
    assert "does not keep attention_head_dim, eps;" in caplog.text
    caplog.clear()
    convert(folder, tmp_path / "diffusers", "diffusers")
    assert not caplog.messages


def test_a_component_that_is_missing(tmp_path):
    part = shutil.copytree(tiny_checkpoint(), tmp_path / "part")
    shutil.rmtree(part / "text_encoder")
    with pytest.raises(
        FileNotFoundError, match=r"part has no text_encoder, which its model_index\.json lists"
    ):
        convert(part, tmp_path / "out", "diffusers")


def test_image_encoder_of_wan_2_1(tmp_path):
    """It is copied within the Diffusers layout; the others have no name for it here."""
    random_i2v_pipeline(experts=1, two_frames=True).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", "diffusers", "bf16")
    assert_identical(read(tmp_path / "out/image_encoder"), read(tmp_path / "source/image_encoder"))
    assert diffusers.WanImageToVideoPipeline.from_pretrained(tmp_path / "out").image_encoder is not None
    for to in ("official", "single-file"):
        with pytest.raises(ValueError, match="image_encoder, image_processor, for which the"):
            convert(tmp_path / "source", tmp_path / "out2", to)
    assert untouched(tmp_path, "out2")
    convert(tmp_path / "source/transformer", tmp_path / "official", "official")
    assert read_json(tmp_path / "official/config.json")["model_type"] == "flf2v"
    assert "img_emb.emb_pos" in read(tmp_path / "official")
    convert(tmp_path / "official", tmp_path / "back", "diffusers")
    assert_identical(read(tmp_path / "back"), read(tmp_path / "source/transformer"))
    diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "back")


# ---- one model ----


@pytest.mark.parametrize("name", RENAMED)
def test_golden_official_files(name, tmp_path):
    """To each layout and back, by the independent rules of the tests."""
    file = Path("tests/golden") / f"{name}.weights.safetensors"
    head = {"attention_head_dim": HEAD_DIMS.get(name)}
    convert(file, tmp_path / "diffusers", "diffusers", **head)
    expected = {n: t for n, t in RENAMED[name](golden(name).weights).items() if "embed_tokens" not in n}
    assert_same_values(read(tmp_path / "diffusers"), expected)
    convert(tmp_path / "diffusers", tmp_path / "official", "official", **head)
    assert_identical(read(tmp_path / "official"), golden(name).weights)
    convert(tmp_path / "official", tmp_path / "single.safetensors", "single-file", **head)
    assert_identical(read(tmp_path / "single.safetensors"), golden(name).weights)
    assert {p.suffix for p in (tmp_path / "official").iterdir()} == (
        {".json", ".safetensors"} if name in TRANSFORMERS else {".pth"}
    )


@pytest.mark.parametrize("form", FILE_FORMS)
def test_every_format(official, form, tmp_path):  # noqa: F811
    values = FILE_FORMS[form](official, tmp_path / "weights")
    convert(tmp_path / "weights", tmp_path / "w.safetensors", "single-file", "fp32", verify=True)
    found = read(tmp_path / "w.safetensors")
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        torch.testing.assert_close(found[name], tensor.float(), rtol=1e-6, atol=1e-7)
    convert(tmp_path / "weights", tmp_path / "as_stored.safetensors", "single-file")
    for name, tensor in read(tmp_path / "as_stored.safetensors").items():
        quantised = writers.is_linear(name, tensor) and form not in ("F16", "BF16")
        stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(form, torch.float32)
        linear = stored if writers.is_linear(name, tensor) else torch.float32
        assert tensor.dtype == (torch.bfloat16 if quantised else linear), name
        torch.testing.assert_close(
            tensor.float(), values[name].to(tensor.dtype).float(), rtol=2**-7, atol=1e-7
        )


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", None])
def test_text_encoders_in_transformers_names(kept, tmp_path):
    """The embedding under either of its names or both, beside the decoder, which is not needed."""
    file = {name: w.clone() for name, w in t5_state_dict(golden("t5").weights).items()}
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if kept and name != kept:
            del file[name]
    save_file(
        file | {"decoder.x": torch.ones(1), "spiece_model": torch.ones(3, dtype=torch.uint8)},
        tmp_path / "w.safetensors",
    )
    convert(tmp_path / "w.safetensors", tmp_path / "out", "official")
    assert_identical(read(tmp_path / "out/models_t5_umt5-xxl-enc-bf16.pth"), golden("t5").weights)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize("to", ["diffusers", "official", "single-file"])
def test_all_tensors_get_the_dtype_asked_for(t2v, to, name, dtype, tmp_path):
    convert(t2v, tmp_path / "out", to, name)
    places = [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".safetensors", ".pth")]
    assert len(places) == 4
    for place in places:
        assert {tensor.dtype for tensor in read(place).values()} == {dtype}


def test_without_a_dtype_each_tensor_keeps_its_own(tmp_path):
    kinds = (torch.float16, torch.float32, torch.bfloat16, torch.float64)
    mixed = {
        name: tensor.to(kinds[i % 4]) for i, (name, tensor) in enumerate(golden("vae21").weights.items())
    }
    torch.save(mixed, tmp_path / "vae.pth")
    convert(tmp_path / "vae.pth", tmp_path / "out.safetensors", "single-file")
    assert_identical(read(tmp_path / "out.safetensors"), mixed)
    start = 8 + int.from_bytes((tmp_path / "out.safetensors").read_bytes()[:8], "little")
    for name, entry in read_header(tmp_path / "out.safetensors")[0].items():
        assert (start + entry["data_offsets"][0]) % mixed[name].dtype.itemsize == 0, "each lies aligned"


def test_values_beyond_float16(official, tmp_path):  # noqa: F811
    changed = official | {"blocks.1.modulation": official["blocks.1.modulation"] + 7e4}
    save_file(changed, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"blocks\.1\.modulation holds 7\d+\.?\d*, float16 ends at 65504; bf16"
    ):
        convert(tmp_path / "w.safetensors", tmp_path / "out", "diffusers", "fp16")
    assert untouched(tmp_path)
    convert(tmp_path / "w.safetensors", tmp_path / "out", "diffusers", "bf16")


# ---- shards and memory ----


@pytest.mark.parametrize(
    ("size", "number"), [("200KB", 200_000), (150_000, 150_000), ("0.1MiB", 104_857), ("1GB", 10**9)]
)
def test_shards(official, size, number, tmp_path):  # noqa: F811
    save_file(official, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "out", "official", "bf16", shard_size=size)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = tmp_path / "out/diffusion_pytorch_model.safetensors.index.json"
    if number == 10**9:
        assert [file.name for file in files] == ["diffusion_pytorch_model.safetensors"]
        assert not index.exists()
        return
    assert [f.name for f in files] == [
        f"diffusion_pytorch_model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    sizes = [{name: t.nbytes for name, t in load_file(file).items()} for file in files]
    assert all(sum(held.values()) <= number or len(held) == 1 for held in sizes)
    assert len(files) < 2 * sum(sum(held.values()) for held in sizes) / number + len(
        [s for s in sizes if len(s) == 1]
    )
    assert read_json(index)["weight_map"] == {
        name: f.name for f, held in zip(files, sizes, strict=True) for name in held
    }
    assert read_json(index)["metadata"]["total_size"] == sum(sum(held.values()) for held in sizes)


def anonymous_memory():
    """Bytes of this process that are not pages of files."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("to", ["diffusers", "single-file", "official"])
def test_memory_is_that_of_a_tensor(to, tmp_path, monkeypatch):
    """67 MB of float32 become 34 MB of bfloat16, of which the largest tensor has 4 MB."""
    weights = {"token_embedding.weight": torch.randn(2048, 1024), "norm.weight": torch.ones(1024)}
    for i in range(2):
        names = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
        weights |= {f"blocks.{i}.{name}.weight": torch.full((1024, 1024), 0.1) for name in names}
        weights |= {f"blocks.{i}.norm{n}.weight": torch.ones(1024) for n in (1, 2)}
        weights[f"blocks.{i}.pos_embedding.embedding.weight"] = torch.ones(32, 16)
    save_file(weights, tmp_path / "t5.safetensors")
    convert(
        tmp_path / "t5.safetensors", tmp_path / "first", "official", "bf16"
    )  # what only the first one takes
    seen, pieces, save = [], OutputTensor.pieces, torch.save

    def measured_pieces(tensor):
        for piece in pieces(tensor):
            seen.append(anonymous_memory())
            yield piece

    def measured_save(*arguments):
        save(*arguments)
        seen.append(anonymous_memory())

    monkeypatch.setattr(OutputTensor, "pieces", measured_pieces)
    monkeypatch.setattr(torch, "save", measured_save)
    out = tmp_path / ("out.safetensors" if to == "single-file" else "out")
    before = anonymous_memory()
    convert(tmp_path / "t5.safetensors", out, to, "bf16", shard_size="10MB")
    assert len(seen) == len(weights) + (to == "official")
    assert sum(t.nbytes for t in weights.values()) > 65e6
    assert max(seen) - before < 12e6


# ---- interrupted, resumed ----


def interrupt(monkeypatch, file_number):
    """Let a conversion stop in the middle of its n-th file."""
    write, written = writing.write_safetensors, []

    def stop(path, entries):
        written.append(path)
        if len(written) == file_number:
            write(path, entries)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise KeyboardInterrupt
        write(path, entries)

    monkeypatch.setattr(writing, "write_safetensors", stop)


@pytest.mark.parametrize("to", ["diffusers", "official", "single-file"])
def test_a_conversion_goes_on_where_it_stopped(t2v, to, tmp_path, monkeypatch):
    count = len(plan(t2v, tmp_path / "out", to, shard_size="50KB").files)
    with monkeypatch.context() as patch:
        interrupt(patch, count - 1)
        with pytest.raises(KeyboardInterrupt):
            convert(t2v, tmp_path / "out", to, shard_size="50KB")
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial"
    kept = {
        p.relative_to(partial): p.stat().st_ino
        for p in partial.rglob("*")
        if p.suffix in (".safetensors", ".pth")
    }
    assert len(kept) == count - 2
    convert(t2v, tmp_path / "out", to, shard_size=50_000, verify=True)
    assert not partial.exists()
    assert {path: (tmp_path / "out" / path).stat().st_ino for path in kept} == kept, (
        "finished files are not written again"
    )
    convert(t2v, tmp_path / "once", to, shard_size="50KB")
    first, second = (
        {p.relative_to(f): p for f in [tmp_path / n] for p in f.rglob("*") if p.is_file()}
        for n in ("out", "once")
    )
    assert first.keys() == second.keys()
    for path, file in first.items():
        if path.suffix in (".safetensors", ".json"):
            assert file.read_bytes() == second[path].read_bytes()
        elif path.suffix == ".pth":
            assert_identical(read(file), read(second[path]))


def test_another_conversion_is_not_continued(t2v, tmp_path, monkeypatch):
    source = shutil.copytree(t2v, tmp_path / "source")
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", "diffusers", "bf16")
    before = sorted((tmp_path / "out.partial").rglob("*"))
    for arguments, what in (
        ((source, "diffusers", "fp16"), "dtype"),
        ((source, "official", "bf16"), "to"),
        ((t2v, "diffusers", "bf16"), "source"),
    ):
        origin, to, dtype = arguments
        with pytest.raises(
            FileExistsError,
            match=rf"out\.partial is what another conversion left, one of another {what}; finish it",
        ):
            convert(origin, tmp_path / "out", to, dtype)
    with pytest.raises(FileExistsError, match="of another shard_size;"):
        convert(source, tmp_path / "out", "diffusers", "bf16", shard_size="1GB")
    torch.save(golden("vae21").weights | {}, source / "Wan2.1_VAE.pth")
    with pytest.raises(FileExistsError, match="of another source;"):
        convert(source, tmp_path / "out", "diffusers", "bf16")
    assert sorted((tmp_path / "out.partial").rglob("*")) == before


@pytest.mark.parametrize("to", ["diffusers", "official", "single-file"])
def test_a_source_that_changes_meanwhile(to, tmp_path, monkeypatch):
    source = Path(shutil.copy("tests/golden/t5.weights.safetensors", tmp_path / "w.safetensors"))
    out = tmp_path / ("out.safetensors" if to == "single-file" else "out")
    write = writing.write_safetensors

    def change(path, entries):
        write(path, entries)
        data = bytearray(source.read_bytes())
        data[-1] ^= 1
        source.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_safetensors", change)
        with pytest.raises(ValueError, match=r"w\.safetensors changed while it was converted; convert again"):
            convert(source, out, to)
    assert untouched(tmp_path)
    convert(source, out, to, verify=True)


def test_other_files_may_appear_in_the_source_meanwhile(t2v, tmp_path, monkeypatch):
    source, write = shutil.copytree(t2v, tmp_path / "source"), writing.write_safetensors

    def add(path, entries):
        write(path, entries)
        (source / "NOTES.md").write_text("new")

    monkeypatch.setattr(writing, "write_safetensors", add)
    convert(source, tmp_path / "out", "single-file")


def test_another_source_of_the_same_size_and_time_is_not_continued(tmp_path, monkeypatch):
    source = Path(shutil.copy("tests/golden/vae21.weights.safetensors", tmp_path / "w.safetensors"))
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", "diffusers", shard_size="100KB")
    times = source.stat()
    save_file({name: tensor + 1 for name, tensor in load_file(source).items()}, source)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(FileExistsError, match="one of another source;"):
        convert(source, tmp_path / "out", "diffusers", shard_size="100KB")


def test_a_second_call_finds_what_a_first_has_placed(t2v, tmp_path, monkeypatch):
    """It was killed between giving the result its name and removing the journal."""
    with monkeypatch.context() as patch:
        patch.setattr(module.Unfinished, "_remove_journal", lambda self: None)
        convert(t2v, tmp_path / "out", "diffusers")
    assert len(list(tmp_path.iterdir())) == 2
    assert convert(t2v, tmp_path / "out", "diffusers") == tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="out is there already"):
        convert(t2v, tmp_path / "out", "diffusers")


def test_a_folder_that_somebody_else_made_is_left_alone(t2v, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/notes").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.partial"):
        convert(t2v, tmp_path / "out", "diffusers")
    assert (tmp_path / "out.partial/notes").read_text() == "mine"


def test_an_existing_destination_is_refused(t2v, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match=r"out is there already; choose another name"):
        convert(t2v, tmp_path / "out", "diffusers")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="link is there already"):
        convert(t2v, tmp_path / "link", "diffusers")


def test_the_disk_is_full(t2v, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs 0\.00\d+ GB more, but its disk has 1e-06 GB left"):
        convert(t2v, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


# ---- verified ----


@pytest.mark.parametrize("to", ["diffusers", "official", "single-file"])
def test_verify_names_the_first_tensor_that_differs(official, to, tmp_path, monkeypatch):  # noqa: F811
    save_file({f"diffusion_model.{n}": t for n, t in official.items()}, tmp_path / "w.safetensors")
    out = tmp_path / ("out.safetensors" if to == "single-file" else "out")
    convert(tmp_path / "w.safetensors", out, to, "bf16", verify=True)
    (shutil.rmtree if out.is_dir() else Path.unlink)(out)
    write = writing.write_safetensors

    def damage(path, entries):
        write(path, entries)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(writing, "write_safetensors", damage)
    last = [*load_file(tmp_path / "w.safetensors")][-1].removeprefix("diffusion_model.")
    with pytest.raises(
        ValueError, match=rf"differs from diffusion_model\.{re.escape(last)} of .*w\.safetensors"
    ):
        convert(tmp_path / "w.safetensors", out, to, "bf16", verify=True)
    assert untouched(tmp_path)
    convert(tmp_path / "w.safetensors", out, to, "bf16")


# ---- refused ----


def empty(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def name_a_missing_shard(folder):
    index = folder / "low_noise_model/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))


GOLDEN_LOW = "tests/golden/expert_t2v_low.weights.safetensors"
CLIP = {"visual.a": torch.ones(1), "log_scale": torch.ones(1)}
REFUSED = {
    "no VAE": (lambda s: (s / "Wan2.1_VAE.pth").unlink(), "lacks a VAE; put it there"),
    "no tokenizer": (lambda s: shutil.rmtree(s / "google"), "lacks a tokenizer's folder, google/umt5-xxl or"),
    "no low noise": (
        lambda s: shutil.rmtree(s / "low_noise_model"),
        "has high_noise_model, but no low_noise_model",
    ),
    "two VAEs": (lambda s: shutil.copy(s / "Wan2.1_VAE.pth", s / "b.pth"), "holds two of vae"),
    "three transformers": (
        lambda s: shutil.copy(GOLDEN_LOW, s / "more.safetensors"),
        r"has 3 transformers, high_noise_model.*; it must have one, or two",
    ),
    "another model": (
        lambda s: torch.save(CLIP, s / "models_clip.pth"),
        r"models_clip\.pth is neither a transformer, nor a VAE, .* it holds log_scale, visual\.a",
    ),
    "no checkpoint": (empty, "holds no weights"),
    "a shard is missing": (name_a_missing_shard, r"0 of 1 shards; missing: gone\.safetensors"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_repositories_that_are_refused(t2v, what, tmp_path):
    change, message = REFUSED[what]
    source = shutil.copytree(t2v, tmp_path / "source")
    change(source)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        convert(source, tmp_path / "out", "diffusers", attention_head_dim=24)
    assert untouched(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.0.more": torch.ones(3)}, r"holds blocks\.0\.more, which this model has no place for"),
        ({"head.modulation": None}, "lacks scale_shift_table"),
        ({"head.modulation": torch.ones(1, 3, 256)}, "scale_shift_table of another shape"),
        ({"vace_blocks.0.after_proj.weight": torch.ones(1)}, "VACE, which is not supported"),
        ({"blocks.0.ffn.0.weight": torch.ones(512, 256, dtype=torch.int8)}, "int8"),
    ],
)
def test_tensors_without_a_place_are_refused(official, changes, message, tmp_path):  # noqa: F811
    file = {name: t for name, t in (official | changes).items() if t is not None}
    save_file(file, tmp_path / "w.safetensors")
    for to in ("diffusers", "official"):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "w.safetensors", tmp_path / "out", to)
    assert untouched(tmp_path)


def test_a_component_in_the_wrong_place(tmp_path):
    source = shutil.copytree(tiny_checkpoint(), tmp_path / "source")
    shutil.rmtree(source / "vae")
    shutil.copytree(source / "transformer", source / "vae")
    with pytest.raises(ValueError, match="vae holds a transformer, not a vae"):
        convert(source, tmp_path / "out", "official")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"to": "diffuser"},
            ValueError,
            "to='diffuser' must be one of 'diffusers', 'official', 'single-file'; the nearest is 'diffusers'",
        ),
        (
            {"dtype": "fp8"},
            ValueError,
            "dtype='fp8' must be a dtype of torch, its name, or 'auto'; the nearest is 'fp",
        ),
        ({"dtype": torch.int8}, ValueError, r"dtype=torch\.int8: models do not compute in it; the nearest"),
        (
            {"shard_size": "5 apples"},
            ValueError,
            "shard_size='5 apples' must be at least one byte, written as '12GB', '11.5GiB' or a number",
        ),
        (
            {"destination": "w.pth"},
            ValueError,
            r"w\.pth is to be a folder, the diffusers layout's; leave \.pth off",
        ),
        ({"shard_size": 0}, ValueError, "shard_size=0 must be"),
        ({"source": "nothing"}, FileNotFoundError, "no file or folder nothing"),
        ({"destination": "inside"}, ValueError, "lies inside of what is to be converted"),
        (
            {"to": "single-file", "model": True},
            ValueError,
            r"out is to be one file; its name must end in \.safetensors, as out\.safetensors does",
        ),
    ],
)
def test_wrong_arguments(t2v, arguments, error, message, tmp_path):
    source = t2v / "high_noise_model" if arguments.pop("model", False) else t2v
    given = {"source": source, "destination": tmp_path / "out", "to": "diffusers"} | arguments
    if "destination" in arguments:
        given["destination"] = t2v / "out" if arguments["destination"] == "inside" else tmp_path / "w.pth"
    with pytest.raises(error, match=message):
        convert(**given)
    assert not list(tmp_path.iterdir())
    assert untouched(t2v)


# ---- the command line ----


@pytest.fixture(scope="module")
def command():
    return runpy.run_path("conversion/convert.py")["main"]


def test_the_command_line(t2v, command, tmp_path, capsys, monkeypatch, bars_are_wanted):
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist's, at which older versions of tqdm cut lines
    command(
        [
            str(t2v),
            str(tmp_path / "out"),
            "--to",
            "diffusers",
            "--dtype",
            "bf16",
            "--shard-size",
            "50KB",
            "--verify",
        ]
    )
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}\n"
    total = sum(t.nbytes for p in (tmp_path / "out").rglob("*.safetensors") for t in load_file(p).values())
    assert re.search(rf"100%.* {total / 1e3:.0f}k/{total / 1e3:.0f}k \[.*B/s\]", printed.err), (
        "sizes and speed"
    )
    assert {t.dtype for t in read(tmp_path / "out/transformer").values()} == {torch.bfloat16}


def test_a_call_shows_no_bar_unless_asked_to(t2v, tmp_path, capsys):
    convert(t2v, tmp_path / "out", "official")
    assert capsys.readouterr() == ("", "")


def test_dry_run(t2v, official, command, tmp_path, capsys):  # noqa: F811
    command([str(t2v), str(tmp_path / "out"), "--to", "diffusers", "--dtype", "fp16", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    line = "blocks.0.ffn.0.weight → blocks.0.ffn.net.0.proj.weight  float16  64×48  "
    for slot in ("transformer", "transformer_2"):
        assert f"{line}{slot}/diffusion_pytorch_model.safetensors" in lines
    assert "settings → scheduler/scheduler_config.json" in lines
    assert f"{t2v / 'google/umt5-xxl'} → tokenizer" in lines
    names = [n for name in ("expert_t2v_high", "expert_t2v_low", "vae21", "t5") for n in golden(name).weights]
    tensors = [line for line in lines if line.endswith(".safetensors")]
    assert sorted(line.split(" → ")[0] for line in tensors) == sorted(names)
    assert lines[-1].startswith(f"{len(names)} tensors, ")
    save_file({f"diffusion_model.{n}": t for n, t in official.items()}, tmp_path / "w.safetensors")
    command([str(tmp_path / "w.safetensors"), str(tmp_path / "out"), "--to", "official", "--dry-run"])
    assert "diffusion_model.head.modulation → head.modulation  float32  1×2×256  " in capsys.readouterr().out
    assert untouched(tmp_path)


def test_errors_of_the_command_line_are_one_line(t2v, command, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match=r"^FileExistsError: .*out is there already"):
        command([str(t2v), str(tmp_path / "out"), "--to", "diffusers"])


def test_an_interrupted_command_says_how_to_go_on(t2v, command, tmp_path, monkeypatch):
    interrupt(monkeypatch, 2)
    with pytest.raises(SystemExit, match="the same command goes on"):
        command([str(t2v), str(tmp_path / "out"), "--to", "diffusers"])


def test_random_models_of_every_kind_convert(tmp_path):
    """Blocks of other numbers and channels than the golden ones."""
    random_transformer(1, 16, 20, image_dim=24, added_kv_proj_dim=48).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "official", "official", verify=True)
    assert read_json(tmp_path / "official/config.json")["model_type"] == "i2v"
    convert(tmp_path / "official", tmp_path / "back", "diffusers", verify=True)
    assert_identical(read(tmp_path / "back"), read(tmp_path / "source"))
