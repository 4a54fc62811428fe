"""Repositories that tests write: of golden weights in the official layout, and as in the hub's cache."""

import json
import shutil

import torch

from tests.builders import golden_tokenizer
from tests.golden_data import FOLDER, golden, relative_error
from wan22 import WanI2VPipeline, WanT2VPipeline

# The golden files' heads: what an official config.json says and the shapes do not.
CONFIGS = {
    name: {
        "_class_name": "WanModel",
        "model_type": kind,
        "dim": golden(name).info["config"]["dim"],
        "num_heads": golden(name).info["config"]["num_heads"],
        "eps": golden(name).info["config"]["eps"],
    }
    for name, kind in (
        ("expert_t2v_high", "t2v"), ("expert_t2v_low", "t2v"), ("dit_t2v_hd32", "t2v"),
        ("dit_i2v_hd32", "i2v"), ("expert_i2v_low", "i2v"), ("dit_ti2v_hd24", "ti2v"),
    )
}  # fmt: skip


def write_transformer(name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(FOLDER / f"{name}.weights.safetensors", folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))


def write_official(folder, transformers, vae):
    """Write a repository in the official layout from golden weights."""
    if len(transformers) == 1:
        write_transformer(transformers[0], folder)
    else:
        for name, place in zip(transformers, ("high_noise_model", "low_noise_model"), strict=True):
            write_transformer(name, folder / place)
    torch.save(golden(vae).weights, folder / ("Wan2.2_VAE.pth" if vae == "vae22" else "Wan2.1_VAE.pth"))
    torch.save(golden("t5").weights, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    golden_tokenizer().save_pretrained(folder / "google/umt5-xxl")
    (folder / "README.md").write_text("a file that nobody needs")
    return folder


FORMS = {
    "t2v": (("expert_t2v_high", "expert_t2v_low"), "vae21", WanT2VPipeline, 0.875, 12.0),
    "i2v": (("dit_i2v_hd32", "expert_i2v_low"), "vae21", WanI2VPipeline, 0.9, 5.0),
    "ti2v": (("dit_ti2v_hd24",), "vae22", WanT2VPipeline, None, 5.0),
    "2.1": (("dit_t2v_hd32",), "vae21", WanT2VPipeline, None, 8.0),
}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def golden_latents(pipe, name):
    """The final latents of a golden text-to-video call."""
    info, _, tensors = golden(name)
    official = info["generate_args"]
    scale = official["guide_scale"]
    low, high = scale if isinstance(scale, list) else (None, scale)
    return quiet(pipe)(
        prompt_embeds=tensors["context"][None],
        negative_prompt_embeds=tensors["context_null"][None],
        width=official["size"][0],
        height=official["size"][1],
        num_frames=official["frame_num"],
        num_inference_steps=official["sampling_steps"],
        flow_shift=official["shift"],
        guidance_scale=high,
        guidance_scale_2=low,
        seed=info["seed"],
        output_type="latent",
    ).frames[0]


def error_to_golden(pipe, name):
    return relative_error(golden_latents(pipe, name), golden(name).io["final_latent"])


def make_repository(cache, name, revisions):
    """Lay out a repository as huggingface_hub caches it: {revision: folder}."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    for i, (revision, source) in enumerate(revisions.items()):
        commit = f"{i + 1:040x}"
        (root / "refs" / revision).write_text(commit)
        for path in sorted(source.rglob("*")):
            if path.is_file():
                target = root / "snapshots" / commit / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                blob = root / "blobs" / f"{commit}-{str(path.relative_to(source)).replace('/', '-')}"
                shutil.copyfile(path, blob)
                target.symlink_to(blob)
