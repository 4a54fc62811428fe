"""LoRA files that do not fit, arguments that are refused, folders and repositories."""

import copy
import logging

import peft
import pytest
import torch
from safetensors.torch import save_file

from tests.builders import latents_of, random_pipeline
from tests.checkpoints.lora_writers import DIALECTS, save
from tests.pipelines.attached.merged_loras import LORA, SLOTS, close, merged
from wan22.checkpoints.lora import sources


def test_no_key_fits(pipe, tmp_path):
    save_file({"unet.down.0.lora_down.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"no key fits transformer; there are unet\.down\.0\.lora"):
        pipe.load_lora_weights(tmp_path / "w.safetensors")
    assert pipe.get_list_adapters() == {}


def test_some_keys_do_not_fit(pipe, tables, caplog, tmp_path):
    """Such as a LoRA of image to video on text to video: layers of other sizes are left out, and named."""
    file = DIALECTS["diffusion_model, alpha"](tables["transformer"])
    file["diffusion_model.patch_embedding.lora_down.weight"] = torch.ones(2, 36, 1, 2, 2)
    out = len(pipe.transformer.patch_embedding.bias)
    file["diffusion_model.patch_embedding.lora_up.weight"] = torch.ones(out, 2)
    file["diffusion_model.blocks.77.self_attn.q.lora_down.weight"] = torch.ones(2, 4)
    save_file(file, tmp_path / "w.safetensors")
    with caplog.at_level(logging.WARNING, "wan22"):
        pipe.load_lora_weights(tmp_path / "w.safetensors")
    assert "blocks.77.self_attn.q.lora_down.weight, patch_embedding fit nothing in transformer" in caplog.text
    close(latents_of(pipe), merged((1, 1), dict.fromkeys(SLOTS, tables["transformer"])))


def test_half_a_pair(pipe, tmp_path):
    save_file({"blocks.0.ffn.0.lora_down.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"of blocks\.0\.ffn\.net\.0\.proj not all matrices"):
        pipe.load_lora_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lokr_t2", "LoKr of a convolution"),
        ("hada_t1", "LoHa of a convolution"),
        ("lora_mid.weight", "LoCon"),
        ("oft_blocks", "OFT"),
    ],
)
def test_other_adapters_are_named(key, kind, pipe, tmp_path):
    save_file({f"lycoris_blocks_0_ffn_0.{key}": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=f"is a {kind}"):
        pipe.load_lora_weights(tmp_path / "w.safetensors")


def test_names_that_look_swapped(pipe, tables, caplog, tmp_path):
    low, high = (
        save(tables[s], tmp_path / f"{n}_noise_model.safetensors")
        for s, n in zip(SLOTS, ("low", "high"), strict=True)
    )
    with caplog.at_level(logging.WARNING, "wan22"):
        pipe.load_lora_weights(high=low, low=high)
    assert "high=low_noise_model.safetensors and low=high_noise_model.safetensors look swapped" in caplog.text


def test_arguments(pipe, tables, tmp_path):
    path = save(tables["transformer"], tmp_path / "w.safetensors")
    for arguments in ({}, {LORA: path, "high": path}):
        with pytest.raises(ValueError, match="give one LoRA, or high= and low="):
            pipe.load_lora_weights(**arguments)
    with pytest.raises(ValueError, match=r"must be one number, or two: \(high, low\)"):
        pipe.load_lora_weights(path, strength=(1, 2, 3))
    for strength in (float("nan"), (1, float("inf")), {"transformer": float("nan")}):
        with pytest.raises(ValueError, match=r"strength=(nan|inf) must be a finite number"):
            pipe.load_lora_weights(path, strength=strength)
    with pytest.raises(ValueError, match="a strength is given for 'high'"):
        pipe.load_lora_weights(path, strength={"high": 1})
    with pytest.raises(TypeError, match="load_lora_weights has no argument cache; the nearest is cache_dir"):
        pipe.load_lora_weights(path, cache=1)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        pipe.load_lora_weights(tmp_path / "none.safetensors")
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(path, "a")
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        pipe.load_lora_weights(path, "a")
    with pytest.raises(ValueError, match="'b' is not in the list of present adapters: a"):
        pipe.set_adapters("b")
    with pytest.raises(ValueError, match="2 strengths for 1 adapters"):
        pipe.set_adapters(["a"], [1, 2])
    pipe = copy.deepcopy(random_pipeline(experts=1))
    with pytest.raises(ValueError, match="a LoRA for transformer_2, which is not loaded"):
        pipe.load_lora_weights(low=path)


# ---- folders and repositories ----


def test_a_folder(pipe, tables, both, tmp_path):
    """With Lightning's two files it is a pair; with one file it is that; with others one must be named."""
    for slot, name in zip(SLOTS, ("high_noise_model", "low_noise_model"), strict=True):
        save(tables[slot], tmp_path / f"{name}.safetensors")
    pipe.load_lora_weights(tmp_path)
    close(latents_of(pipe), both)
    pipe.unload_lora_weights()
    (tmp_path / "low_noise_model.safetensors").unlink()
    pipe.load_lora_weights(tmp_path)
    close(latents_of(pipe), merged((1, 1), dict.fromkeys(SLOTS, tables["transformer"])))
    pipe.unload_lora_weights()
    save(tables["transformer_2"], tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds high_noise_model\..*, other\..*; give"):
        pipe.load_lora_weights(tmp_path)
    pipe.load_lora_weights(tmp_path, weight_name="other.safetensors")
    close(latents_of(pipe), merged((1, 1), dict.fromkeys(SLOTS, tables["transformer_2"])))


def test_a_repository(pipe, tables, both, tmp_path, monkeypatch):
    folder = tmp_path / "Seko-V1"
    folder.mkdir()
    for slot, name in zip(SLOTS, ("high_noise_model", "low_noise_model"), strict=True):
        save(tables[slot], folder / f"{name}.safetensors")
    names = ["README.md", *(f"Seko-V1/{n}_noise_model.safetensors" for n in ("high", "low"))]
    monkeypatch.setattr(sources, "list_repo_files", lambda repo, **hub: names)

    def download(repo, name, subfolder, **hub):
        assert (repo, hub) == ("org/lightning", {"revision": "v1"})
        return str(tmp_path / subfolder / name)

    monkeypatch.setattr(sources, "hf_hub_download", download)
    pipe.load_lora_weights("org/lightning", subfolder="Seko-V1", revision="v1")
    close(latents_of(pipe), both)


def test_peft_is_underneath(pipe, tables, tmp_path):
    pipe.load_lora_weights(save(tables["transformer"], tmp_path / "w.safetensors"))
    assert isinstance(pipe.transformer.blocks[0].attn1.to_q, peft.tuners.lora.Linear)
