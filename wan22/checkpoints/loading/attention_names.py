"""diffusers' names of attention kernels, and wan22's."""

from ...checks import shown

# wan22's kernel for each of diffusers' that it has; one from the hub is taken from its installed library.
_OURS = {
    "native": "native",
    "_native_cudnn": "cudnn",
    "_native_efficient": "efficient",
    "_native_flash": "flash",
    "_native_math": "math",
    "flash": "flash",  # FlashAttention 2, which PyTorch has built in
    "flash_hub": "flash_attn_2",
    "_flash_3": "flash_attn_3",
    "_flash_3_hub": "flash_attn_3",
    "flash_4_hub": "flash_attn_4",
    "sage": "sage",
    "sage_hub": "sage",
}
# The nearest of wan22's for each of the others.
_NEAREST = {
    "aiter_fa2_hub": "flash_attn_2",
    "flash_varlen": "flash_attn_2",
    "flash_varlen_hub": "flash_attn_2",
    "_flash_varlen_3": "flash_attn_3",
    "_flash_3_varlen_hub": "flash_attn_3",
    "flex": "native",
    "_native_npu": "native",
    "_native_xla": "native",
    "sage_blackwell_hub": "sage",
    "sage_varlen": "sage",
    "_sage_qk_int8_pv_fp8_cuda": "sage",
    "_sage_qk_int8_pv_fp8_cuda_sm90": "sage",
    "_sage_qk_int8_pv_fp16_cuda": "sage",
    "_sage_qk_int8_pv_fp16_triton": "sage",
    "xformers": "efficient",
}
_THEIRS = {
    **{ours: theirs for theirs, ours in _OURS.items() if theirs.startswith("_native")},
    "native": "native",
    "flash_attn_2": "flash",
    "flash_attn_3": "_flash_3",
    "flash_attn_4": "flash_4_hub",
    "sage": "sage",
}


def our_name(name: str, wanted: bool = True) -> str:
    """Return wan22's name of a kernel, given it or diffusers'; as it is, if it need not be one of wan22's.

    Raises: ValueError: it is one of diffusers' that wan22 has none like.
    """
    name = getattr(name, "value", name)  # diffusers' names are an enumeration, too
    if wanted and name in _NEAREST:
        raise ValueError(
            f"attention backend {shown(name)} of diffusers is not among wan22's; "
            f"the nearest is {shown(_NEAREST[name])}"
        )
    return _OURS.get(name, name)


def their_name(name: str) -> str:
    """Return diffusers' name of one of wan22's kernels; a ValueError says if it has none."""
    if name not in _THEIRS:
        raise ValueError(
            f"diffusers has no attention backend like {shown(name)}; it has {', '.join(_THEIRS)}"
        )
    return _THEIRS[name]
