"""The one place where attention is computed.

Shapes: b batch, l query tokens, s key tokens, n heads, d head size.
"""

import torch
import torch.nn.functional as F


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax attention without causality or dropout.

    Args:
        query: "b l n d".
        key: "b s n d".
        value: "b s n d".
        bias: "b s", added to the logits of each key for every query and head; log(c) makes one key count as
            c.

    Returns: "b l n d".
    """
    mask = None if bias is None else bias[:, None, None, :].to(query.dtype)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # b l n d -> b n l d
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
