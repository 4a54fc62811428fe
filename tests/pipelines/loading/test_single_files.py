"""Pipelines from single files."""

import pytest
import torch
from diffusers import BitsAndBytesConfig, GGUFQuantizationConfig
from safetensors.torch import load_file, save_file

from tests.builders import golden_tokenizer
from tests.checkpoints import writers
from tests.golden_data import golden, relative_error
from tests.pipelines.loading.repositories import golden_latents, quiet
from wan22 import (
    FlowMatchUniPCScheduler,
    WanI2VPipeline,
    WanT2VPipeline,
    tiny_checkpoint,
)
from wan22.checkpoints.files import hub
from wan22.checkpoints.quantized_linear import QuantizedLinear


def test_each_file_may_be_of_another_format(tmp_path):
    """The high-noise expert in ComfyUI's scaled float8, the low-noise one as .pth, with prefixes."""
    high, low = (golden(name).weights for name in ("expert_t2v_high", "expert_t2v_low"))
    values = writers.comfy_old({k: v.clone() for k, v in high.items()}, tmp_path / "high.safetensors")
    torch.save({f"model.diffusion_model.{name}": w for name, w in low.items()}, tmp_path / "low.pth")
    torch.save(golden("vae21").weights, tmp_path / "vae.pth")
    save_file(golden("t5").weights, tmp_path / "t5.safetensors")
    save_file({k: v.contiguous() for k, v in values.items()}, tmp_path / "expanded.safetensors")

    def pipeline(high):
        return WanT2VPipeline.from_single_file(
            tmp_path / high,
            str(tmp_path / "low.pth"),
            vae=tmp_path / "vae.pth",
            text_encoder=tmp_path / "t5.safetensors",
            tokenizer=golden_tokenizer(),
            dtype=torch.float32,
            attention_head_dim=24,
        )

    pipe = pipeline("high.safetensors")
    assert pipe.config.boundary_ratio == 0.875
    assert pipe.scheduler.config.shift == 12.0
    assert isinstance(pipe.transformer.blocks[0].ffn.net[2], QuantizedLinear)
    assert not isinstance(pipe.transformer_2.blocks[0].ffn.net[2], QuantizedLinear)
    expected = golden_latents(pipeline("expanded.safetensors"), "pipe_t2v_unipc")
    torch.testing.assert_close(golden_latents(pipe, "pipe_t2v_unipc"), expected, rtol=1e-4, atol=1e-5)


def test_one_transformer_and_models_in_place_of_files(tmp_path):
    save_file(golden("dit_ti2v_hd24").weights, tmp_path / "w.safetensors")
    torch.save(golden("vae22").weights, tmp_path / "vae.pth")
    for pipeline in (WanT2VPipeline, WanI2VPipeline):
        pipe = pipeline.from_single_file(
            tmp_path / "w.safetensors", vae=tmp_path / "vae.pth", attention_head_dim=24, dtype=torch.float32
        )
        assert pipe.config.expand_timesteps
        assert pipe.config.boundary_ratio is None
        assert pipe.text_encoder is None
    again = WanT2VPipeline.from_single_file(
        tmp_path / "w.safetensors",
        vae=pipe.vae,
        attention_head_dim=24,
        scheduler=FlowMatchUniPCScheduler(shift=9.0),
    )
    assert again.vae is pipe.vae
    assert again.scheduler.config.shift == 9.0


def test_single_files_for_images(tmp_path):
    for slot, name in (("high", "dit_i2v_hd32"), ("low", "expert_i2v_low")):
        save_file(golden(name).weights, tmp_path / f"{slot}.safetensors")
    torch.save(golden("vae21").weights, tmp_path / "vae.pth")
    pipe = WanI2VPipeline.from_single_file(
        tmp_path / "high.safetensors",
        tmp_path / "low.safetensors",
        vae=tmp_path / "vae.pth",
        dtype=torch.float32,
        attention_head_dim=32,
    )
    assert pipe.config.boundary_ratio == 0.9
    info, _, io = golden("pipe_i2v_unipc")
    official = info["generate_args"]
    latents = quiet(pipe)(
        io["image_uint8_hwc"].numpy(),
        prompt_embeds=io["context"][None],
        negative_prompt_embeds=io["context_null"][None],
        max_area=official["max_area"],
        num_frames=official["frame_num"],
        num_inference_steps=official["sampling_steps"],
        flow_shift=official["shift"],
        guidance_scale=official["guide_scale"][1],
        guidance_scale_2=official["guide_scale"][0],
        seed=info["seed"],
        output_type="latent",
    ).frames[0]
    assert relative_error(latents, io["final_latent"]) <= 5e-6


def test_single_files_that_do_not_fit(tmp_path):
    save_file(golden("expert_t2v_high").weights, tmp_path / "w.safetensors")
    torch.save(golden("vae22").weights, tmp_path / "vae22.pth")
    with pytest.raises(ValueError, match="give vae="):
        WanT2VPipeline.from_single_file(tmp_path / "w.safetensors", attention_head_dim=24)
    with pytest.raises(ValueError, match="16 latent channels, the VAE has 48"):
        WanT2VPipeline.from_single_file(
            tmp_path / "w.safetensors", vae=tmp_path / "vae22.pth", attention_head_dim=24
        )
    torch.save(golden("vae21").weights, tmp_path / "vae21.pth")
    with pytest.raises(ValueError, match="use WanT2VPipeline"):
        WanI2VPipeline.from_single_file(
            tmp_path / "w.safetensors", vae=tmp_path / "vae21.pth", attention_head_dim=24
        )
    for name, error, said in (
        ("variant", ValueError, "variant cannot be used"),
        ("hi", TypeError, "nearest is high"),
    ):
        with pytest.raises(error, match=said):
            WanT2VPipeline.from_single_file(
                tmp_path / "w.safetensors", vae=tmp_path / "vae22.pth", **{name: 1}
            )


# ---- diffusers' arguments ----

TINY = tiny_checkpoint()
FILE = TINY / "transformer/diffusion_pytorch_model.safetensors"
VAE = TINY / "vae/diffusion_pytorch_model.safetensors"


def test_the_first_file_by_diffusers_name():
    pipe = WanT2VPipeline.from_single_file(pretrained_model_link_or_path=FILE, vae=VAE, config=str(TINY))
    assert pipe.transformer.config.attention_head_dim == 64, "of the configuration: no tensor says it"
    with pytest.raises(TypeError, match="one file, address or table"):
        WanT2VPipeline.from_single_file(FILE, pretrained_model_link_or_path=FILE, vae=VAE)


def test_gguf_with_diffusers_configuration(tmp_path):
    writers.write_gguf(load_file(FILE), tmp_path / "w.gguf", "Q8_0")
    config = GGUFQuantizationConfig(compute_dtype=torch.float16)
    options = {"vae": VAE, "config": TINY, "quantization_config": config, "low_cpu_mem_usage": True}
    pipe = WanT2VPipeline.from_single_file(tmp_path / "w.gguf", tmp_path / "w.gguf", **options)
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float16
    assert isinstance(pipe.transformer_2.blocks[0].attn1.to_q, QuantizedLinear)


def test_addresses_on_the_hub(monkeypatch):
    files = {"org/name/x/high.safetensors": FILE, "org/name/vae.safetensors": VAE}
    asked = []

    def download(repository, path, **options):
        asked.append(options)
        return str(files[f"{repository}/{path}"])

    monkeypatch.setattr(hub, "hf_hub_download", download)
    pipe = WanT2VPipeline.from_single_file(
        "https://huggingface.co/org/name/blob/main/x/high.safetensors",
        vae="org/name/vae.safetensors",
        attention_head_dim=64,
        local_files_only=True,
    )
    assert pipe.vae.config.z_dim == 16
    assert asked == [
        {"local_files_only": True, "revision": "main"},
        {"local_files_only": True, "revision": None},
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": tiny_checkpoint("ti2v")}, r"says .*, but the tensors of .* say"),
        ({"original_config": {"a": 1}}, "original_config is not supported"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "BitsAndBytesConfig"),
        ({"attention_head_dim": 64, "variant": "fp16"}, "variant cannot be used with"),
    ],
)
def test_what_single_files_cannot_follow_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WanT2VPipeline.from_single_file(FILE, vae=VAE, **options)


def test_the_device():
    pipe = WanT2VPipeline.from_single_file(FILE, vae=VAE, attention_head_dim=64, device="meta")
    assert {part.device.type for part in (pipe.transformer, pipe.vae)} == {"meta"}
