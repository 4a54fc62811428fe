"""Pipelines from single files."""

import pytest
import torch
from safetensors.torch import save_file

from tests.builders import (
    byte_tokenizer,
)
from tests.checkpoints import writers
from tests.golden_data import golden, relative_error
from tests.pipelines.loading.repositories import golden_latents, quiet
from wan22 import (
    FlowMatchUniPCScheduler,
    WanI2VPipeline,
    WanT2VPipeline,
)
from wan22.checkpoints.loading.quantized_linear import QuantizedLinear


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
            tokenizer=byte_tokenizer(),
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
    with pytest.raises(ValueError, match="hi cannot be used"):
        WanT2VPipeline.from_single_file(tmp_path / "w.safetensors", vae=tmp_path / "vae22.pth", hi=1)
