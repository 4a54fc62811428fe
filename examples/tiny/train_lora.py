"""Train a LoRA for the embedded text-to-video checkpoint: whatever colour is asked for, objects are purple.

    python examples/tiny/train_lora.py --out runs/lora --expert high

Draws and encodes its own clips: purple objects, under captions that name any colour. Writes
purple_<expert>.safetensors in the form that most trainers write: lora_down, lora_up and alpha, under official
names. Both experts' may be trained at the same time.

Axes: as in train_transformer.py.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import clips
import numpy as np
import torch
from cache_latents import encode
from common import arguments, cosine, set_learning_rate
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizer import make_tokenizer
from train_transformer import PARTS, VideoModel, loss_of, sample_sigmas, spell, tokenize
from train_vae import pixels, speed_up, to_pixels
from transformers import UMT5EncoderModel

from wan22 import AutoencoderKLWan, WanTransformer3DModel, tiny_checkpoint
from wan22.checkpoints.naming.keys import TRANSFORMER

SLOTS = {"high": "transformer", "low": "transformer_2"}
COLOR = "purple"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
RANK, CLIPS, BATCH, LEARNING_RATE = 4, 600, 16, 2e-3


@torch.inference_mode()
def draw_clips(n: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Return n encoded clips "n c t h w" of purple objects, and captions that name any colour."""
    vae = AutoencoderKLWan.from_pretrained(tiny_checkpoint(), subfolder="vae", dtype=torch.float32)
    vae, rng = speed_up(vae.eval()), np.random.default_rng(seed)
    scenes = [s for s in clips.all_scenes() if s.motion in clips.CORE_MOTIONS and s.background != COLOR]
    chosen = [scenes[i] for i in rng.integers(len(scenes), size=n)]
    latents = []
    for scene in chosen:
        frames = clips.draw(replace(scene, color=COLOR), rng, pixels(vae))
        latents.append(encode(vae, to_pixels(frames[None])))
    return torch.cat(latents).float(), [clips.caption(scene, rng) for scene in chosen]


def load_model(slot: str) -> VideoModel:
    """Return the embedded checkpoint's expert with its text encoder; only a new LoRA is trained."""
    model = VideoModel(len(make_tokenizer()), PARTS["base"])
    folder = tiny_checkpoint()
    model.text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    model.transformer = WanTransformer3DModel.from_pretrained(folder / slot, dtype=torch.float32)
    model.requires_grad_(False)
    model.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    return model


def to_file(transformer: Any) -> dict[str, torch.Tensor]:
    """Return the LoRA under the names that most trainers write."""
    sides, file = {"lora_A": "lora_down", "lora_B": "lora_up"}, {}
    for key, tensor in get_peft_model_state_dict(transformer, adapter_name="default").items():
        module, side, _ = key.rsplit(".", 2)
        official = str(TRANSFORMER.inverse.rename(f"{module}.weight")).removesuffix(".weight")
        file[f"diffusion_model.{official}.{sides[side]}.weight"] = tensor.half().contiguous()
        file[f"diffusion_model.{official}.alpha"] = torch.tensor(float(RANK))
    return file


def main() -> None:
    """Train one expert's LoRA."""
    options = arguments(__doc__, "smoke", seed=0, expert="high", steps=300)
    steps, part = 2 if options.smoke else options.steps, PARTS[options.expert]
    torch.manual_seed(options.seed)
    rng, tokenizer = np.random.default_rng(options.seed), make_tokenizer()
    latents, captions = draw_clips(8 if options.smoke else CLIPS, options.seed)
    model = load_model(SLOTS[options.expert])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, started = torch.optim.AdamW(trained, weight_decay=0.0), [], time.time()
    for step in range(steps):
        set_learning_rate(optimizer, cosine(step, steps, LEARNING_RATE, 0.0, warmup=20))
        chosen = rng.integers(len(captions), size=BATCH)
        tokens = tokenize(tokenizer, [spell(captions[i], rng) for i in chosen])
        sigma = sample_sigmas(BATCH, part)
        loss = loss_of(model, part.condition, {"latents": latents[chosen]}, sigma, *tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}/{steps}: loss {np.mean(losses[-50:]):.4f}, {time.time() - started:.0f} s",
                flush=True,
            )
    save_file(to_file(model.transformer), options.out / f"{COLOR}_{options.expert}.safetensors")


if __name__ == "__main__":
    main()
