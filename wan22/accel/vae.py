"""A faster autoencoder, equal up to rounding: channels innermost in memory, upsampling by convolution.

Shapes: `b` batch, `c` channels, `h w` rows and columns.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from ..models.autoencoder import AutoencoderKLWan
from ..models.autoencoder_layers import CausalConv3d, Upsample
from ..private_apis import version
from .methods import is_replaced


class SubpixelConv2d(nn.Module):
    """Double height and width by nearest neighbour and convolve 3x3, without the doubled image.

    A 3x3 window of the doubled image holds 2x2 different pixels. So each of the four pixels that a pixel
    becomes is a 2x2 convolution of the small image with sums of the weights: 16 products instead of 36.
    If the weights have changed since, the image is doubled. The parameters of `conv` stay, under their names.
    """

    sums: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        w = conv.weight.detach().to(torch.promote_types(conv.weight.dtype, torch.float32))
        for axis in (-2, -1):
            # The even row of a pair sees the small image's rows (-1, 0, 0), the odd one (0, 0, 1).
            first, second, third = w.split(1, dim=axis)
            even, odd = (first, second + third), (first + second, third)
            w = torch.stack([torch.cat(even, dim=axis), torch.cat(odd, dim=axis)])
        w = w.transpose(0, 1).flatten(0, 2)  # column row c c 2 2 to (row column c) c 2 2
        w = w.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)
        self.register_buffer("sums", w, persistent=False)
        self.summed = _identity(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map "b c h w" to "b c 2h 2w"."""
        # Tracing on the meta device replaces the weights by others without values.
        known = torch.compiler.is_compiling() or self.weight.is_meta
        if not known and _identity(self.weight) != self.summed:
            doubled = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
            return F.conv2d(doubled, self.weight, self.bias, padding=1)
        b, _, h, w = x.shape
        bias = None if self.bias is None else self.bias.repeat(4)
        # All four convolutions at every corner between pixels, h + 1 by w + 1 of them.
        corners = F.conv2d(x, self.sums, bias, padding=1).unflatten(1, (2, 2, -1))
        y = x.new_empty((b, 2 * h, 2 * w, corners.shape[3])).permute(0, 3, 1, 2)
        for row in (0, 1):
            for column in (0, 1):
                y[:, :, row::2, column::2] = corners[:, row, column, :, row : row + h, column : column + w]
        return y


def accelerate(vae: AutoencoderKLWan) -> None:
    """Make an autoencoder faster, in place; in float32 its results change by less than 1e-5 of their norm.

    On a GPU that holds with `torch.backends.cudnn.allow_tf32 = False`: by default PyTorch rounds operands of
    float32 convolutions to TF32, an error of 1e-3 with or without this. In half types the error is that of
    the plain model, within a tenth.

    Weights save and move as before. After loading other weights, and for a copy of the model, call it again,
    as it keeps sums of them; until then those layers compute as before, but compiled code keeps the old sums.

    Args:
        vae: the autoencoder with its weights, in the dtype and on the device that it will run in and on, or
            offloaded to that device as a whole.

    Raises: TypeError: vae is not wan22's autoencoder; ValueError: it is offloaded piece by piece, or its
        layers are cast as they run.
    """
    _check(vae)
    _refuse_hooks(vae)
    detach(vae)
    for module in vae.modules():
        if isinstance(module, Upsample):
            plain: nn.Conv2d = module.resample[1]  # type: ignore[assignment]
            module.resample = nn.Sequential(nn.Identity(), SubpixelConv2d(plain))
        elif isinstance(module, CausalConv3d):
            module.skips_zeros = True
    device = get_module_execution_device(vae)
    for conv in _convolutions(vae):
        if not _faster_contiguous(conv.weight, device):
            layout = torch.channels_last_3d if conv.weight.ndim == 5 else torch.channels_last
            conv.weight.data = conv.weight.data.contiguous(memory_format=layout)


def detach(vae: AutoencoderKLWan) -> None:
    """Undo `accelerate`, in place: results are those of the plain model, to the bit.

    Raises: ValueError: it is accelerated, and offloaded piece by piece since.
    """
    _check(vae)
    if any(isinstance(module, SubpixelConv2d) for module in vae.modules()):
        _refuse_hooks(vae)
    for module in vae.modules():
        if isinstance(module, Upsample) and isinstance(module.resample[1], SubpixelConv2d):
            fast = module.resample[1]
            out_channels, in_channels = fast.weight.shape[:2]
            plain = nn.Conv2d(in_channels, out_channels, 3, padding=1, device="meta")
            plain.weight, plain.bias = fast.weight, fast.bias
            double = nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
            module.resample = nn.Sequential(double, plain)
        elif isinstance(module, CausalConv3d):
            module.skips_zeros = False
    for conv in _convolutions(vae):
        conv.weight.data = conv.weight.data.contiguous()


def _check(vae: object) -> None:
    if not isinstance(vae, AutoencoderKLWan):
        kind = type(vae)
        library = kind.__module__.partition(".")[0]
        raise TypeError(f"vae is a {kind.__name__} of {library}; load it with wan22.AutoencoderKLWan")


def _refuse_hooks(vae: AutoencoderKLWan) -> None:
    """Refuse layers with hooks of others: they would be lost with the layer, or miss its sums."""
    for name, module in vae.named_modules():
        if name and is_replaced(module, "forward"):
            raise ValueError(
                f"vae.{name} has another's hook, of an offload piece by piece or of layerwise casting; "
                "accelerate, or undo that, before it is attached"
            )


def _convolutions(vae: AutoencoderKLWan) -> Iterator[nn.Conv3d | nn.Conv2d]:
    for module in vae.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            yield module


def _faster_contiguous(weight: Tensor, device: torch.device) -> bool:
    """Whether channels stay outermost: oneDNN is 5 to 25 % faster so for wide layers in float32, and on MPS
    convolutions of volumes with channels innermost are not known to be right.
    """
    if device.type == "mps":
        return True
    return device.type == "cpu" and weight.dtype == torch.float32 and max(weight.shape[:2]) >= 256


def _identity(tensor: Tensor) -> tuple[int, int | None]:
    """Return what changes when a tensor is replaced or written to; keep the tensor beside it.

    Tensors made in torch.inference_mode do not count writes, and compiled code cannot ask.
    """
    unknown = torch.compiler.is_compiling() or tensor.is_inference()
    return id(tensor), None if unknown else version(tensor)
