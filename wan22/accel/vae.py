"""A faster autoencoder whose last digits differ: channels innermost in memory, upsampling by convolution.

Shapes: `b` batch, `c` channels, `h w` rows and columns.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from ..models.autoencoder import AutoencoderKLWan
from ..models.autoencoder_layers import CausalConv3d, Upsample


class SubpixelConv2d(nn.Module):
    """Double height and width by nearest neighbour and convolve 3x3, without making the doubled image.

    A 3x3 window of the doubled image holds 2x2 different pixels. So each of the four pixels that a pixel
    becomes is a 2x2 convolution of the small image with sums of the weights: 16 products in place of 36.

    Args:
        conv: the 3x3 convolution; its parameters stay, under their names, beside the sums.
    """

    sums: Tensor

    def __init__(self, conv: nn.Conv2d):
        """Sum the weights in float32."""
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

    def forward(self, x: Tensor) -> Tensor:
        """Map "b c h w" to "b c 2h 2w"."""
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
    """Make an autoencoder compute faster; in float32 its results move by less than 1e-5 of their norm.

    In half types they are as far from the exact results as those of the plain model, within a tenth. Weights
    save and move as before; after others are loaded it has to be called again, for it keeps sums of them.

    Args:
        vae: the autoencoder, its weights loaded, in the dtype and on the device, a CPU or a CUDA GPU, that it
            will run in. It is changed in place.
    Raises: TypeError: vae is not wan22's autoencoder.
    """
    detach(vae)
    for module in vae.modules():
        if isinstance(module, Upsample):
            plain: nn.Conv2d = module.resample[1]  # type: ignore[assignment]
            module.resample = nn.Sequential(nn.Identity(), SubpixelConv2d(plain))
        elif isinstance(module, CausalConv3d):
            module.skips_zeros = True
    on_cpu = get_module_execution_device(vae).type == "cpu"
    for conv in _convolutions(vae):
        if not (on_cpu and _faster_contiguous(conv.weight)):
            layout = torch.channels_last_3d if conv.weight.ndim == 5 else torch.channels_last
            conv.weight.data = conv.weight.data.contiguous(memory_format=layout)


def detach(vae: AutoencoderKLWan) -> None:
    """Undo `accelerate`: results are again those of the plain model, to the bit.

    Args:
        vae: the autoencoder, accelerated or not. It is changed in place.
    Raises: TypeError: vae is not wan22's autoencoder.
    """
    if not isinstance(vae, AutoencoderKLWan):
        raise TypeError(f"vae is a {type(vae).__name__}; it must be a wan22 AutoencoderKLWan")
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


def _convolutions(vae: AutoencoderKLWan) -> Iterator[nn.Conv3d | nn.Conv2d]:
    """Yield the convolutions whose weights have the layout that is used."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            yield module


def _faster_contiguous(weight: Tensor) -> bool:
    """Whether oneDNN convolves faster with channels outermost: wide layers in float32, by 5 to 25 %."""
    return weight.dtype == torch.float32 and max(weight.shape[:2]) >= 256
