"""How keys are spelled: prefixes, names of adapters, parts; what is twice there or fits nothing."""

import itertools
import math

import pytest
import torch

from tests.builders import random_pipeline
from wan22.checkpoints.files.weights import WeightFile
from wan22.checkpoints.lora.dialects import read_lora
from wan22.checkpoints.lora.spellings import read_key

MODULE, OURS, SIZE = "blocks.1.self_attn.q", "blocks.1.attn1.to_q", 48


@pytest.fixture(scope="module")
def shapes():
    return {name: tuple(p.shape) for name, p in random_pipeline().transformer.named_parameters()}


@pytest.fixture(scope="module")
def matrices():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, SIZE, generator=generator), torch.randn(SIZE, 4, generator=generator)


def read(tensors, shapes):
    return read_lora(WeightFile("w", tensors), shapes)


def is_there(lora, matrices, module=OURS):
    assert lora.layers.keys() == {module}
    assert not lora.unmatched
    assert torch.equal(lora.layers[module].parts["lora_A"], matrices[0])
    assert torch.equal(lora.layers[module].parts["lora_B"], matrices[1])


WORDS = (
    "base_model.model.",
    "diffusion_model.",
    "model.",
    "module.",
    "_orig_mod.",
    "pipe.dit.",
    "dit.",
    "unet.",
)
PREFIXES = ["", *("".join(words) for n in (1, 2) for words in itertools.permutations(WORDS, n))]


@pytest.mark.parametrize("expert", ["", "transformer.", "transformer_2.", "low_noise_model.", "pipe.dit2."])
def test_prefixes_in_any_order(expert, shapes, matrices):
    slot = "transformer" if expert in ("", "transformer.") else "transformer_2"
    for module, prefix in itertools.product((MODULE, OURS), PREFIXES):
        for before in (expert + prefix, prefix + expert):
            tensors = dict(zip((f"{before}{module}.lora_{s}.weight" for s in "AB"), matrices, strict=True))
            is_there(read(tensors, shapes)[slot], matrices)


@pytest.mark.parametrize(
    "form",
    [
        "{}.lora_A.weight",
        "{}.lora_A",
        "{}.lora_down",
        "{}.lora_down.weight",
        "{}.lora.down.weight",
        "{}.lora_A.default",
        "{}.lora_A.default.weight",
        "{}.lora_A.wan2.2-lightning-v1.1.weight",
        "{}.lora_A.lora_B.weight",
        "{}.lora_A.my.weight.weight",
        "{}.lora_A.alpha.weight",
        "blocks.1._orig_mod.self_attn.q.lora_A.weight",
        "module.blocks.1._orig_mod.self_attn._orig_mod.q.lora_A.weight",
        "_fsdp_wrapped_module.blocks.1._checkpoint_wrapped_module.self_attn.q.lora_A.weight",
        "lora_unet_blocks_1_self_attn_q.lora_down.weight",
        "lora_unet__blocks_1_self_attn_q.lora_A.weight",
        "lora_unet_blocks_1__orig_mod_self_attn_q.lora_down.weight",
        "lora_unet__orig_mod_blocks_1_self_attn_q.lora_down.weight",
        "lora_unet_diffusion_model_blocks_1_self_attn_q.lora_down.weight",
        "lycoris_blocks_1_attn1_to_q.lora_down.weight",
        "lora_transformer_blocks_1_attn1_to_q.lora_down.weight",
    ],
)
def test_forms_of_keys(form, shapes, matrices):
    down = form.format(MODULE)
    up = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}
    old = next(part for part in up if part in down)
    is_there(
        read({down: matrices[0], down.replace(old, up[old], 1): matrices[1]}, shapes)["transformer"], matrices
    )


def test_both_experts_by_the_names_of_the_official_folders(shapes, matrices):
    experts = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
    tensors = {
        f"{e}.{MODULE}.lora_{s}.weight": m
        for e in experts.values()
        for s, m in zip("AB", matrices, strict=True)
    }
    loras = read(tensors, shapes)
    for slot in experts:
        is_there(loras[slot], matrices)


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("blocks.1.modulation.diff", "blocks.1.scale_shift_table"),
        ("blocks.1.diff_m", "blocks.1.scale_shift_table"),
        ("blocks.1.scale_shift_table.diff", "blocks.1.scale_shift_table"),
        ("lora_unet_blocks_1_modulation.diff", "blocks.1.scale_shift_table"),
        ("pipe.dit.head.modulation.diff", "scale_shift_table"),
        ("blocks.1.norm3.diff", "blocks.1.norm2.weight"),
        ("blocks.1.norm3.w_norm", "blocks.1.norm2.weight"),
        ("blocks.1.norm3.b_norm", "blocks.1.norm2.bias"),
        ("lycoris_blocks_1_self_attn_q.diff_b", "blocks.1.attn1.to_q.bias"),
    ],
)
def test_whole_differences(key, ours, shapes):
    delta = torch.randn(shapes[ours])
    lora = read({key: delta}, shapes)["transformer"]
    assert lora.deltas.keys() == {ours}
    assert torch.equal(lora.deltas[ours], delta)


def test_a_bias_after_the_second_matrix(shapes, matrices):
    """PEFT's lora_bias: it has the matrices' scale."""
    bias = torch.randn(SIZE)
    tensors = dict(zip((f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"), matrices, strict=True))
    tensors |= {f"{MODULE}.alpha": torch.tensor(2.0), f"{MODULE}.lora_B.default.bias": bias}
    lora = read(tensors, shapes)["transformer"]
    torch.testing.assert_close(lora.deltas[f"{OURS}.bias"], bias * 2 / 4)
    with pytest.raises(ValueError, match="such a bias is not read"):
        read(tensors | {f"{MODULE}.dora_scale": torch.ones(SIZE)}, shapes)


def test_dora_of_blissful_tuner(shapes, matrices):
    name = "lora_unet_blocks_1_self_attn_q"
    tensors = dict(zip((f"{name}.lora_down.weight", f"{name}.lora_up.weight"), matrices, strict=True))
    tensors |= {f"{name}.dora_layer.weight": torch.ones(SIZE), "use_dora_flag": torch.tensor(True)}
    lora = read(tensors, shapes)["transformer"]
    assert (lora.layers[OURS].kind, lora.unmatched) == ("dora", [])


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.blocks.1.ffn.0.lora_A.weight",
        "lora_te_blocks_1_self_attn_q.lora_down.weight",
        "blocks.99.self_attn.q.lora_A.weight",
        "blocks.1.self_attn.q.lora_A.bias",
        "blocks.1.self_attn.q.weight",
        "blocks.1.self_attn.q.reshape_weight",
        "blocks.99.self_attn.q.alpha",
    ],
)
def test_what_fits_nothing_is_reported(key, shapes, matrices):
    tensors = dict(zip((f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"), matrices, strict=True))
    lora = read(tensors | {key: torch.ones(1)}, shapes)["transformer"]
    assert lora.unmatched == [key]


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ((f"{MODULE}.lora_A.weight", f"diffusion_model.{MODULE}.lora_A.weight"), OURS),
        ((f"{MODULE}.lora_A.weight", f"{OURS}.lora_A.weight"), OURS),
        ((f"{MODULE}.lora_A.weight", f"{MODULE}.lora_down.weight"), OURS),
        ((f"{MODULE}.lora_A.one.weight", f"{MODULE}.lora_A.two.weight"), OURS),
        ((f"{MODULE}.alpha", "lora_unet_blocks_1_self_attn_q.alpha"), OURS),
        (("blocks.1.diff_m", "blocks.1.modulation.diff"), "blocks.1.scale_shift_table"),
    ],
)
def test_two_keys_for_one_part_are_refused(keys, place, shapes):
    with pytest.raises(ValueError) as error:
        read({key: torch.ones(1) for key in keys}, shapes)
    assert str(error.value) == f"w: {keys[0]} and {keys[1]} are for the same part of {place}"


def layer(a, b, **parts):
    return {f"{MODULE}.{name}": part for name, part in {"lora_A": a, "lora_B": b, **parts}.items()}


BAD = {
    "ranks": (
        layer(torch.ones(4, SIZE), torch.ones(SIZE, 2)),
        r"lora_B \(48, 2\) and lora_A \(4, 48\) disagree: 2 and 4",
    ),
    "no rank": (
        layer(torch.ones(0, SIZE), torch.ones(SIZE, 0)),
        r"lora_A has shape \(0, 48\) and is no matrix",
    ),
    "a vector": (layer(torch.ones(SIZE), torch.ones(SIZE, 1)), r"lora_A has shape \(48,\) and is no matrix"),
    "NaN": (layer(torch.full((4, SIZE), math.nan), torch.ones(SIZE, 4)), "lora_A holds NaN or infinity"),
    "infinity": (
        layer(torch.ones(4, SIZE), torch.full((SIZE, 4), -math.inf)),
        "lora_B holds NaN or infinity",
    ),
    "NaN alpha": (
        layer(torch.ones(4, SIZE), torch.ones(SIZE, 4), alpha=torch.tensor(math.nan)),
        "alpha holds NaN or infinity",
    ),
    "a complex alpha": (
        layer(torch.ones(4, SIZE), torch.ones(SIZE, 4), alpha=torch.tensor(1j)),
        "alpha is complex64",
    ),
    "two alphas": (
        layer(torch.ones(4, SIZE), torch.ones(SIZE, 4), alpha=torch.ones(2)),
        r"alpha must be one number, and has shape \(2,\)",
    ),
    "integers": (layer(torch.ones(4, SIZE).to(torch.int8), torch.ones(SIZE, 4)), "lora_A is int8"),
    "kinds": (
        layer(torch.ones(4, SIZE), torch.ones(SIZE, 4), lokr_w1=torch.ones(1, 1)),
        "lokr_w1, lora_A, lora_B are of different kinds",
    ),
    "three axes": (
        layer(torch.ones(4, SIZE, 1), torch.ones(SIZE, 4)),
        r"lora_A has shape \(4, 48, 1\) and is no matrix",
    ),
    "LoHa's ranks": (
        {
            f"{MODULE}.hada_w{n}_{s}": torch.ones(z)
            for n in (1, 2)
            for s, z in (("a", (SIZE, n)), ("b", (1, SIZE)))
        },
        "the ranks of hada_w2_a .* disagree: 2 and 1",
    ),
    "LoHa's sizes": (
        {
            f"{MODULE}.hada_w{n}_{s}": torch.ones(z)
            for n in (1, 2)
            for s, z in (("a", (n, 1)), ("b", (1, SIZE)))
        },
        r"of different sizes, \[1, 48\] and \[2, 48\]",
    ),
    "LoKr's ranks": (
        {
            f"{MODULE}.lokr_{n}": torch.ones(z)
            for n, z in (("w1", (2, 2)), ("w2_a", (24, 3)), ("w2_b", (2, 24)))
        },
        r"lokr_w2_a \(24, 3\) and lokr_w2_b \(2, 24\) disagree",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_are_refused(name, shapes):
    tensors, said = BAD[name]
    with pytest.raises(ValueError, match=rf"w: blocks\.1\.(self_attn\.q|attn1\.to_q).*{said}"):
        read(tensors, shapes)


def test_float8(shapes, matrices):
    tensors = {f"{MODULE}.lora_{s}": m.to(torch.float8_e4m3fn) for s, m in zip("AB", matrices, strict=True)}
    assert read(tensors, shapes)["transformer"].layers


def test_what_a_key_says():
    assert read_key("high_noise_model.head.head.diff_b").expert == "transformer"
    assert read_key("transformer.head.head.diff_b").expert is None
    assert read_key("blocks.0.self_attn.q.lora_magnitude_vector.x.y.weight").part == "lora_magnitude_vector"
    assert read_key("module").part is None


def test_long_keys_make_no_long_errors(shapes):
    name = "x" * 10**6
    for tensors in (
        {f"{MODULE}.lora_A.{name}.weight": torch.full((4, SIZE), math.nan)},
        {f"{MODULE}.lora_A.{name}{i}.weight": torch.ones(4, SIZE) for i in range(2)},
        {f"{name}.lora_mid.weight": torch.ones(1)},
    ):
        with pytest.raises(ValueError) as error:
            read(tensors, shapes)
        assert len(str(error.value)) < 800
