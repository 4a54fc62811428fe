"""Small models and pipelines: the golden ones, and random ones with every component of a checkpoint."""

import contextlib
import copy
import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.golden_data import golden
from tests.official_keys import transformer_config, transformer_state_dict
from tests.official_t5_keys import t5_config, t5_state_dict
from tests.official_vae_keys import vae_state_dict
from wan22 import (
    AutoencoderKLWan,
    FlowMatchUniPCScheduler,
    WanI2VPipeline,
    WanT2VPipeline,
    WanTransformer3DModel,
)

TEXT_DIM = 32
MODELS = ("text_encoder", "vae", "transformer", "transformer_2")
SMALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "guidance_scale_2": 2.0,
    "flow_shift": 5.0,
}


@functools.cache
def golden_transformer(name: str) -> WanTransformer3DModel:
    description, weights, _ = golden(name)
    model = WanTransformer3DModel(**transformer_config(description["config"])).eval()
    model.load_state_dict(transformer_state_dict(weights))
    return model


@functools.cache
def golden_vae(name: str) -> AutoencoderKLWan:
    description, weights, _ = golden(name)
    config = description["config"]
    arguments = {
        k: config[k] for k in ("z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample")
    }
    arguments |= {"base_dim": config["dim"], "decoder_base_dim": config.get("dec_dim")}
    if name == "vae22":
        arguments |= VAE22 | {
            k: description[o] for k, o in (("latents_mean", "latent_mean"), ("latents_std", "latent_std"))
        }
    model = AutoencoderKLWan(**arguments).eval()
    model.load_state_dict(vae_state_dict(weights))
    return model


# What makes a VAE the one of Wan 2.2 TI2V-5B, beside its sizes.
VAE22 = {
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}


@functools.cache
def golden_text_encoder() -> UMT5EncoderModel:
    description, weights, _ = golden("t5")
    model = UMT5EncoderModel(UMT5Config(**t5_config(description["config"]))).eval()
    model.load_state_dict(t5_state_dict(weights))
    return model


def random_transformer(
    seed: int, channels: int = 16, given_channels: int = 0, **config
) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=channels + given_channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        **config,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def random_vae(seed: int, channels: int = 16) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    if channels == 16:
        return AutoencoderKLWan(base_dim=3, num_res_blocks=1).eval()
    statistics = {"latents_mean": [0.1] * channels, "latents_std": [2.0] * channels}
    sizes = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": channels, "num_res_blocks": 1}
    return AutoencoderKLWan(**sizes, **statistics, **VAE22).eval()


def random_text_encoder(seed: int) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=260, d_model=TEXT_DIM, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def byte_tokenizer(tokens: int = 259) -> PreTrainedTokenizerFast:
    """A tokenizer of umT5's form, with one token per byte: padding 0, end 1, unknown 2.

    With fewer ``tokens`` the last bytes, which are not of ASCII, are unknown.
    """
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((special + alphabet)[:tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def golden_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for golden_text_encoder."""
    return byte_tokenizer(golden("t5").info["config"]["vocab"])


@functools.cache
def random_components(experts: int = 2, channels: int = 16) -> dict:
    """Return WanT2VPipeline's arguments: of T2V-A14B's form; one expert, 48 channels: TI2V-5B's."""
    return {
        "tokenizer": byte_tokenizer(),
        "text_encoder": random_text_encoder(1),
        "vae": random_vae(2, channels),
        "transformer": random_transformer(3, channels),
        "transformer_2": random_transformer(4, channels) if experts == 2 else None,
        "boundary_ratio": 0.875 if experts == 2 else None,
        "expand_timesteps": channels == 48,
    }


@functools.cache
def random_i2v_components(experts: int = 2, two_frames: bool = False) -> dict:
    """Return WanI2VPipeline's arguments: of I2V-A14B's form; one expert: of Wan 2.1 I2V's, or FLF's."""
    components = random_components(experts)
    if experts == 2:
        models = {
            "transformer": random_transformer(5, 16, 20),
            "transformer_2": random_transformer(6, 16, 20),
        }
        return {**components, **models, "boundary_ratio": 0.9}
    config = {"image_dim": 24, "added_kv_proj_dim": 48, "pos_embed_seq_len": 10 if two_frames else None}
    torch.manual_seed(7)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return {
        **components,
        "transformer": random_transformer(7, 16, 20, **config),
        "image_encoder": CLIPVisionModel(vision).eval(),
        "image_processor": CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8),
    }


def random_i2v_pipeline(experts: int = 2, two_frames: bool = False, **replaced) -> WanI2VPipeline:
    """Return an image-to-video pipeline on shared random components."""
    components = random_i2v_components(experts, two_frames)
    pipe = WanI2VPipeline(**{"scheduler": FlowMatchUniPCScheduler(shift=5.0), **components, **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_ti2v_pipeline(**replaced) -> WanI2VPipeline:
    """Return an image-to-video pipeline of TI2V-5B's form."""
    components = {"scheduler": FlowMatchUniPCScheduler(shift=5.0), **random_components(1, 48)}
    pipe = WanI2VPipeline(**{**components, **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_pipeline(experts: int = 2, channels: int = 16, **replaced) -> WanT2VPipeline:
    """Return a pipeline on shared random components, with a scheduler of its own."""
    components = {
        "scheduler": FlowMatchUniPCScheduler(shift=5.0),
        **random_components(experts, channels),
        **replaced,
    }
    pipe = WanT2VPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bf16_pipeline():
    """As the hub's repositories are: everything bf16 but the VAE."""
    components = random_components()
    half = {n: copy.deepcopy(components[n]).to(torch.bfloat16) for n in MODELS if n != "vae"}
    return random_pipeline(**half)


def load_pipeline(folder, **arguments):
    pipe = WanT2VPipeline.from_pretrained(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, prompt="a red circle", **arguments) -> torch.Tensor:
    """Run a small call and return its latents."""
    arguments = {**SMALL, "seed": 7, "output_type": "latent", **arguments}
    if "generator" in arguments or "latents" in arguments:
        arguments["seed"] = None
    if "sigmas" in arguments or "timesteps" in arguments:
        arguments |= {"num_inference_steps": None, "flow_shift": None}
    if pipe.config.boundary_ratio is None:
        arguments["guidance_scale_2"] = None
    if "prompt_embeds" in arguments:
        prompt = None
    return pipe(prompt, **arguments).frames


@contextlib.contextmanager
def recording(pipe):
    """Record the model calls of a pipeline as a list of (component, timestep or None)."""
    calls, handles = [], []

    def hook(name):
        def record(module, args, kwargs):
            timestep = kwargs.get("timestep")
            calls.append((name, None if timestep is None else float(timestep.flatten()[0])))

        return record

    for name in ("text_encoder", "transformer", "transformer_2"):
        model = getattr(pipe, name)
        if model is not None:
            handles.append(model.register_forward_pre_hook(hook(name), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
