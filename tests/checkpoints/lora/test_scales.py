"""The factor of a LoRA's matrices: from alphas among the tensors, headers, PEFT's configuration, or none."""

import json
import logging
import math

import pytest
import torch
from safetensors.torch import save_file

from tests.builders import random_pipeline
from tests.checkpoints.lora_writers import in_diffusers
from wan22.checkpoints.files.weights import WeightFile, read_weights
from wan22.checkpoints.lora.dialects import read_lora
from wan22.checkpoints.lora.scales import check_strength

RANKS = {"blocks.0.self_attn.q": 8, "blocks.1.self_attn.q": 8, "blocks.1.ffn.2": 4}
FIRST, SECOND, THIRD = RANKS
OURS = {module: in_diffusers(module) for module in RANKS}


@pytest.fixture(scope="module")
def shapes():
    return {name: tuple(p.shape) for name, p in random_pipeline().transformer.named_parameters()}


@pytest.fixture(scope="module")
def matrices(shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        module: tuple(
            torch.randn(size, generator=generator)
            for size in (
                (rank, shapes[f"{OURS[module]}.weight"][1]),
                (shapes[f"{OURS[module]}.weight"][0], rank),
            )
        )
        for module, rank in RANKS.items()
    }


def keys(matrices, form="diffusion_model.{}", down="lora_A.weight", up="lora_B.weight"):
    tensors = {}
    for module, (a, b) in matrices.items():
        tensors |= {f"{form.format(module)}.{down}": a.clone(), f"{form.format(module)}.{up}": b.clone()}
    return tensors


def kohya(matrices):
    flat = {module.replace(".", "_"): pair for module, pair in matrices.items()}
    return keys(flat, "lora_unet_{}", "lora_down.weight", "lora_up.weight")


def changes(lora):
    """What a LoRA adds to each layer's weight."""
    return {
        name: w.scale_alpha / w.rank * w.parts["lora_B"] @ w.parts["lora_A"]
        for name, w in lora.layers.items()
    }


def agree(lora, matrices, factors):
    found = changes(lora)
    assert found.keys() == set(OURS.values())
    for module, (a, b) in matrices.items():
        torch.testing.assert_close(found[OURS[module]], factors[module] * (b @ a))


def everywhere(factor):
    return {module: factor(rank) for module, rank in RANKS.items()}


def in_header(config, prefix=""):
    return {"lora_adapter_metadata": json.dumps({f"{prefix}{key}": value for key, value in config.items()})}


RANKED = {"r": 8, "rank_pattern": {"ffn.2": 4, "ffn.net.2": 4}}
# PEFT's settings, and the factors that they mean.
CONFIGS = {
    "alpha below the rank": ({"lora_alpha": 2, **RANKED}, everywhere(lambda r: 2 / r)),
    "alpha above it": ({"lora_alpha": 20.5, **RANKED}, everywhere(lambda r: 20.5 / r)),
    "rank-stabilised": (
        {"lora_alpha": 8, "use_rslora": True, **RANKED},
        everywhere(lambda r: 8 / math.sqrt(r)),
    ),
    "of a layer": (
        {"lora_alpha": 8, "alpha_pattern": {"blocks.1.attn1.to_q": 2, "ffn.2": 3}, **RANKED},
        {FIRST: 1, SECOND: 2 / 8, THIRD: 3 / 4},
    ),
    "of a layer, by its whole name": (
        {"lora_alpha": 16, "alpha_pattern": {"^blocks.0.self_attn.q": 4}, **RANKED},
        {FIRST: 4 / 8, SECOND: 2, THIRD: 4},
    ),
    "of layers, the first pattern": (
        {"lora_alpha": 8, "alpha_pattern": {r"blocks\.\d+\.self_attn\.q": 1, "self_attn.q": 2}, **RANKED},
        {FIRST: 1 / 8, SECOND: 1 / 8, THIRD: 2},
    ),
    "a name's end is a whole name": (
        {"lora_alpha": 8, "alpha_pattern": {"attn.q": 1, "n.q": 2, "0.self_attn.q": 3}, **RANKED},
        {FIRST: 3 / 8, SECOND: 1, THIRD: 2},
    ),
    "without a rank": ({"lora_alpha": 2}, everywhere(lambda r: 2 / r)),
    "without an alpha": (RANKED, everywhere(lambda r: 1)),
    "rank-stabilised, without an alpha": ({"use_rslora": True}, everywhere(math.sqrt)),
    "nulls": ({"lora_alpha": None, "r": None, "alpha_pattern": None}, everywhere(lambda r: 1)),
    "PEFT's own words": (
        {"peft_type": "LORA", "bias": "none", "lora_alpha": 2, "init_lora_weights": True, "use_dora": False},
        everywhere(lambda r: 2 / r),
    ),
}


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model."])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_header_of_diffusers(name, prefix, shapes, matrices, tmp_path):
    config, factors = CONFIGS[name]
    save_file(keys(matrices), tmp_path / "w.safetensors", {"format": "pt", **in_header(config, prefix)})
    agree(read_lora(read_weights(tmp_path / "w.safetensors"), shapes)["transformer"], matrices, factors)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_peft(name, shapes, matrices):
    config, factors = CONFIGS[name]
    file = WeightFile("w", keys(matrices, "base_model.model.{}"), {"adapter_config.json": config})
    agree(read_lora(file, shapes)["transformer"], matrices, factors)


def test_each_expert_has_its_own(shapes, matrices):
    tensors = keys(matrices, "transformer.{}") | keys(matrices, "transformer_2.{}")
    told = {"transformer.lora_alpha": 2, "transformer_2.lora_alpha": 3, "text_encoder.lora_alpha": 7}
    loras = read_lora(WeightFile("w", tensors, {"lora_adapter_metadata": json.dumps(told)}), shapes)
    for slot, alpha in (("transformer", 2), ("transformer_2", 3)):
        agree(loras[slot], matrices, everywhere(lambda r, alpha=alpha: alpha / r))
    del told["transformer_2.lora_alpha"]
    loras = read_lora(WeightFile("w", tensors, {"lora_adapter_metadata": json.dumps(told)}), shapes)
    agree(loras["transformer_2"], matrices, everywhere(lambda r: 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alphas_among_the_tensors_count_first(dtype, shape, shapes, matrices):
    tensors = keys(matrices)
    tensors |= {f"diffusion_model.{m}.alpha": torch.full(shape, 6, dtype=dtype) for m in (FIRST, THIRD)}
    metadata = in_header({"lora_alpha": 2}) | {
        "adapter_config.json": {"lora_alpha": 99},
        "ss_network_alpha": "1",
    }
    factors = {FIRST: 6 / 8, SECOND: 2 / 8, THIRD: 6 / 4}
    agree(read_lora(WeightFile("w", tensors, metadata), shapes)["transformer"], matrices, factors)


def test_alphas_of_which_a_note_says_that_they_are_rank_stabilised(shapes, matrices):
    """Blissful Tuner's."""
    tensors = kohya(matrices)
    tensors |= {f"lora_unet_{m.replace('.', '_')}.alpha": torch.tensor(4.0) for m in RANKS}
    for flag, factor in ((False, lambda r: 4 / r), (True, lambda r: 4 / math.sqrt(r))):
        file = WeightFile("w", tensors | {"use_rslora_flag": torch.tensor(flag)})
        lora = read_lora(file, shapes)["transformer"]
        agree(lora, matrices, everywhere(factor))
        assert not lora.unmatched


# ---- kohya's header ----

MODULE = {"ss_network_module": "networks.lora_wan"}


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({"ss_network_alpha": "2", **MODULE}, lambda r: 2 / r),
        ({"ss_network_alpha": "2.0"}, lambda r: 2 / r),
        ({"ss_network_alpha": "None"}, lambda r: 1),
        ({"ss_network_alpha": "0"}, lambda r: 1),  # as its trainers take it
        ({"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, lambda r: 1),
        ({"ss_network_alpha": "2", "ss_network_args": '{"use_rslora": "True"}'}, lambda r: 2 / math.sqrt(r)),
        ({"ss_network_alpha": "2", "ss_network_args": '{"use_rslora": "False"}'}, lambda r: 2 / r),
    ],
)
def test_a_header_of_kohya(metadata, factor, shapes, matrices):
    lora = read_lora(WeightFile("w", kohya(matrices), metadata), shapes)["transformer"]
    agree(lora, matrices, everywhere(factor))


def test_a_header_of_kohya_with_another_rank_is_void(shapes, matrices, caplog):
    metadata = {"ss_network_alpha": "2", "ss_network_dim": "8"}
    lora = read_lora(WeightFile("w", kohya(matrices), metadata), shapes)["transformer"]
    agree(lora, matrices, {FIRST: 2 / 8, SECOND: 2 / 8, THIRD: 1})
    assert "ss_network_dim says rank 8, but the matrices have 4; its alpha is not used" in caplog.text


def test_a_converted_lora_has_its_alpha_in_the_matrices(shapes, matrices, caplog):
    """As musubi-tuner's convert_lora.py writes it: the header is the trainer's."""
    caplog.set_level(logging.INFO)
    metadata = {"ss_network_alpha": "1", "ss_network_dim": "8", **MODULE}
    agree(
        read_lora(WeightFile("w", keys(matrices), metadata), shapes)["transformer"],
        matrices,
        everywhere(lambda r: 1),
    )
    assert "ss_network_alpha=1 is in its converted matrices" in caplog.text
    del metadata["ss_network_module"], metadata["ss_network_dim"]  # then another program wrote the header
    lora = read_lora(WeightFile("w", keys(matrices), metadata), shapes)["transformer"]
    agree(lora, matrices, everywhere(lambda r: 1 / r))


@pytest.mark.parametrize("rank", ["r", "lora_rank", "rank"])
def test_an_alpha_in_the_header_itself(rank, shapes, matrices):
    pair = {module: matrices[module] for module in (FIRST, SECOND)}
    lora = read_lora(WeightFile("w", keys(pair), {"lora_alpha": "4", rank: "8"}), shapes)["transformer"]
    assert {w.scale_alpha / w.rank for w in lora.layers.values()} == {0.5}


# ---- LoKr and LoHa ----


@pytest.mark.parametrize("kind", ["LOKR", "LOHA"])
def test_lokr_and_loha_of_peft(kind, shapes):
    o, i = shapes["blocks.0.attn1.to_q.weight"]
    whole = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(o // 4, i // 4)}
    factors = {
        f"hada_w{n}_{side}": torch.randn(s) for n in (1, 2) for side, s in (("a", (o, 2)), ("b", (2, i)))
    }
    parts = whole if kind == "LOKR" else factors
    tensors = {f"base_model.model.blocks.0.attn1.to_q.{name}": part for name, part in parts.items()}
    r = 64 if kind == "LOKR" else 2  # PEFT makes whole matrices where the rank is large
    config = {"peft_type": f"PeftType.{kind}", "r": r, "alpha": 3}
    lora = read_lora(WeightFile("w", tensors, {"adapter_config.json": config}), shapes)["transformer"]
    (weights,) = lora.layers.values()
    assert weights.scale_alpha / weights.rank == pytest.approx(3 / r)
    tensors |= {"base_model.model.blocks.0.attn1.to_q.alpha": torch.tensor(5.0)}
    (weights,) = read_lora(WeightFile("w", tensors), shapes)["transformer"].layers.values()
    # LyCORIS writes an alpha beside whole matrices, and does not use it.
    assert weights.scale_alpha / weights.rank == (1 if kind == "LOKR" else 5 / r)
    header = {"ss_network_alpha": "5", "ss_network_dim": str(r)}
    tensors.popitem()
    (weights,) = read_lora(WeightFile("w", tensors, header), shapes)["transformer"].layers.values()
    assert weights.scale_alpha / weights.rank == (1 if kind == "LOKR" else 5 / r)


# ---- errors ----


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"r": 16, "lora_alpha": 4},
            r"w: blocks\.0\.attn1\.to_q: lora_.* says rank 16, but the matrices have 8",
        ),
        ({"r": 8, "lora_alpha": 4}, r"w: blocks\.1\.ffn\.net\.2: .* says rank 8, but the matrices have 4"),
        ({"peft_type": "IA3"}, "peft_type is IA3; LOHA, LOKR, LORA are read"),
        ({"modules_to_save": ["head"]}, r"modules_to_save is \['head'\]; such LoRAs are not read"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changes the model's own weights"),
        ({"use_dora": True}, "use_dora is set, but the magnitudes are not there"),
        ({"r": 0}, "r=0 must be an int, at least 1"),
        ({"r": "8"}, "r='8' must be an int"),
        ({"lora_alpha": "much"}, "lora_alpha='much' must be a number"),
        ({"lora_alpha": math.nan}, "lora_alpha=nan must be a finite number"),
        ({"alpha_pattern": {"q": None}}, "alpha_pattern of q=None must be a number"),
        ({"alpha_pattern": {"(q": 1}}, r"alpha_pattern: \(q is no regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern is a list, no table"),
    ],
)
def test_configurations_that_are_refused(config, said, shapes, matrices):
    with pytest.raises(ValueError, match=said) as error:
        read_lora(WeightFile("w", keys(matrices), in_header(config, "transformer.")), shapes)
    assert len(str(error.value)) < 400


def test_whole_biases_are_refused(shapes, matrices):
    config = {"adapter_config.json": {"bias": "all"}}
    agree(
        read_lora(WeightFile("w", keys(matrices), config), shapes)["transformer"],
        matrices,
        everywhere(lambda r: 1),
    )
    tensors = keys(matrices) | {"diffusion_model.blocks.0.self_attn.q.bias": torch.zeros(128)}
    with pytest.raises(ValueError, match=r"w: adapter_config\.json: bias is all; whole biases are not read"):
        read_lora(WeightFile("w", tensors, config), shapes)


@pytest.mark.parametrize(("text", "said"), [("{", "is no JSON"), ("[1]", "is a list, no table")])
def test_a_damaged_header(text, said, shapes, matrices):
    with pytest.raises(ValueError, match=f"w: lora_adapter_metadata in the header {said}"):
        read_lora(WeightFile("w", keys(matrices), {"lora_adapter_metadata": text}), shapes)


def test_strengths():
    assert check_strength(torch.tensor(0.5)) == 0.5
    for value in (math.nan, -math.inf, "x" * 10**5, None):
        with pytest.raises(ValueError, match=r"strength=.{3,400} must be a (finite )?number; 1 is the LoRA"):
            check_strength(value)
