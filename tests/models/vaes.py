"""Small autoencoders of both families, and what the tests compare."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from tests.official_vae_keys import vae_state_dict
from wan22 import AutoencoderKLWan

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("2.1", "2.2")

CONFIGS = {
    "2.1": {"base_dim": 4, "num_res_blocks": 1},
    "2.2": {
        "base_dim": 4,
        "decoder_base_dim": 6,
        "z_dim": 48,
        "num_res_blocks": 1,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.01 * i for i in range(48)],
        "latents_std": [0.5 + 0.02 * i for i in range(48)],
    },
}


def tiny_vae(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> AutoencoderKLWan:
    """An autoencoder with random weights, the same at each call; `changes` are to its config."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**{**CONFIGS[family], **changes})
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return vae.to(dtype).eval().requires_grad_(False)


def make_pointwise(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Let no place look at its neighbours, so that any tiling must give the untiled result."""
    for name, parameter in vae.named_parameters():
        if ".proj." in name:
            parameter.zero_()
        elif parameter.ndim >= 4 and parameter.shape[-2:] == (3, 3):
            centre = parameter[..., 1, 1].clone()
            parameter.zero_()[..., 1, 1] = 3 * centre
    return vae


def random_video(vae: AutoencoderKLWan, b: int, t: int, h: int, w: int) -> Tensor:
    """Pixels "b 3 t h w" in [-1, 1] for t latent frames of h x w cells."""
    s = vae.spatial_stride
    frames = 1 + vae.temporal_stride * (t - 1)
    x = torch.rand(b, 3, frames, h * s, w * s, generator=torch.Generator().manual_seed(1))
    return (x * 2 - 1).to(vae.dtype)


def random_latents(vae: AutoencoderKLWan, b: int, t: int, h: int, w: int) -> Tensor:
    """Latents "b c t h w"."""
    z = torch.randn(b, vae.config.z_dim, t, h, w, generator=torch.Generator().manual_seed(2))
    return z.to(vae.dtype)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    assert value.shape == reference.shape
    return ((value - reference).double().norm() / reference.double().norm()).item()


def golden_vae(name: str) -> tuple[AutoencoderKLWan, dict[str, dict[str, Tensor]]]:
    """The official model of a golden file, in our class, and the file's cases."""
    description = json.loads((GOLDEN / f"{name}.json").read_text())
    config, tensors = description["config"], load_file(GOLDEN / f"{name}.io.safetensors")
    shared = {
        k: config[k] for k in ("z_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "attn_scales")
    }
    statistics = {
        "latents_mean": tensors["latent_mean"].tolist(),
        "latents_std": (1 / tensors["latent_inv_std"].double()).tolist(),
    }
    patched = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    family = {"decoder_base_dim": config["dec_dim"], **patched} if name == "vae22" else {}
    vae = (
        AutoencoderKLWan(base_dim=config["dim"], **shared, **statistics, **family)
        .eval()
        .requires_grad_(False)
    )
    vae.load_state_dict(vae_state_dict(load_file(GOLDEN / f"{name}.weights.safetensors")))
    cases: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if "." in key:
            case, part = key.split(".")
            cases.setdefault(case, {})[part] = value[None]
    return vae, cases


class PeakMemory(TorchDispatchMode):
    """Measures the most bytes that tensors made inside it occupied at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._alive = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._alive.values()))
        return result
