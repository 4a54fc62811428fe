"""The tables of parameter names: complete, one rule per key, the same in both directions."""

import pytest
import torch
from diffusers import WanTransformer3DModel as DiffusersTransformer
from transformers import UMT5Config, UMT5EncoderModel

from tests.golden_data import golden
from tests.official_keys import transformer_state_dict
from tests.official_t5_keys import t5_state_dict
from tests.official_vae_keys import vae_state_dict
from wan22.checkpoints.naming.keys import TEXT_ENCODER, TEXT_ENCODER_GGUF, TRANSFORMER, autoencoder_keys

TABLES = {
    "transformer": TRANSFORMER,
    "vae 2.1": autoencoder_keys(residual=False),
    "vae 2.1, short": autoencoder_keys(residual=False, res_blocks=1, levels=3),
    "vae 2.2": autoencoder_keys(residual=True),
    "text encoder": TEXT_ENCODER,
    "text encoder, gguf": TEXT_ENCODER_GGUF,
}


@pytest.mark.parametrize(
    ("name", "table", "expected"),
    [
        ("dit_t2v_hd32", TRANSFORMER, transformer_state_dict),
        ("dit_i2v_hd32", TRANSFORMER, transformer_state_dict),
        ("dit_ti2v_hd24", TRANSFORMER, transformer_state_dict),
        ("vae21", TABLES["vae 2.1"], vae_state_dict),
        ("vae22", TABLES["vae 2.2"], vae_state_dict),
        ("t5", TEXT_ENCODER, t5_state_dict),
    ],
)
def test_official_files_are_renamed_as_the_independent_rules_say(name, table, expected):
    weights = {key: torch.empty(0) for key in golden(name).weights}
    names = {key: table.rename(key) for key in golden(name).weights}
    assert set(names.values()) == expected(golden(name).weights).keys() - {"encoder.embed_tokens.weight"}
    assert len(set(names.values())) == len(weights)
    for key, ours in names.items():
        marked = expected(golden(name).weights | {key: golden(name).weights[key] * 0 + 7})
        assert (marked[ours] == 7).all(), key


@pytest.mark.parametrize("name", TABLES)
def test_every_key_has_one_rule_and_the_way_back_is_its_inverse(name):
    table = TABLES[name]
    inverse = table.inverse
    sources = [source.format(3, 4) for source, _ in table.rules]
    assert len(set(sources)) == len(sources)
    for (source, target), key in zip(table.rules, sources, strict=True):
        assert source.count("{}") == target.count("{}")
        matching = [rule for rule in table.rules if type(table)([rule]).rename(key)]
        assert len(matching) == 1, (key, matching)
        assert inverse.rename(table.rename(key)) == key


def test_image_embeddings_of_wan_2_1(tmp_path):
    """Every parameter of diffusers' FLF transformer has an official name, and that name leads back to it."""
    model = DiffusersTransformer(
        num_attention_heads=2, attention_head_dim=16, in_channels=36, text_dim=8, freq_dim=8, ffn_dim=8,
        num_layers=1, image_dim=8, added_kv_proj_dim=32, pos_embed_seq_len=4,
    )  # fmt: skip
    inverse = TRANSFORMER.inverse
    unnamed = {key for key in model.state_dict() if inverse.rename(key) is None}
    assert {key.rpartition(".")[0] for key in unnamed} <= {"blocks.0.attn2.norm_added_q"}
    official = {inverse.rename(key) for key in model.state_dict()} - {None}
    assert {"img_emb.emb_pos", "img_emb.proj.4.bias", "blocks.0.cross_attn.k_img.weight"} <= official


def test_text_encoder_in_gguf_names():
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )
    names = {TEXT_ENCODER_GGUF.inverse.rename(key) for key in model.state_dict()} - {None}
    assert len(names) == len(model.state_dict().keys() - {"encoder.embed_tokens.weight"})
    assert {"token_embd.weight", "enc.blk.1.attn_rel_b.weight", "enc.blk.0.ffn_gate.weight"} <= names


def test_unknown_keys_have_no_name():
    assert TRANSFORMER.rename("blocks.0.self_attn.q.weight.more") is None
    assert TRANSFORMER.rename("blocks.x.self_attn.q.weight") is None
    assert TRANSFORMER.count(["blocks.0.self_attn.q.weight", "nothing"]) == 1
