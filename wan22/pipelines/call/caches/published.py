"""Ratios that are known by the checkpoint's name: published ones, and the miniatures' own.

Source: Zehong-Ma/MagCache, MagCache4Wan2.2/magcache_generate.py, measured with the official schedules of 40
steps (A14B) and 50 (TI2V-5B). Each list is that of steps 1, 2, …; the ratio at the switch of the experts,
which have nothing to do with each other's residuals, is left out, and an expert's first step has 1.
"""

from pathlib import Path

from .ratios import CacheRatios

ASSETS = Path(__file__).parents[3] / "assets"
FILE = "cache_ratios.json"


def _numbers(text: str) -> tuple[float, ...]:
    return (1.0, *map(float, text.split()))


_T2V_A14B = CacheRatios(
    {
        "transformer": _numbers(
            "1.0012 .9982 .9970 .9970 .9966 .9960 .9958 .9948 .9963 .9966 .9953 .9958 .9968 .9956 .9944 "
            ".9959 .9947 .9945 .9939 .9939 .9935 .9928 .9927 .9906 .9912"
        ),
        "transformer_2": _numbers(
            ".9881 .9877 .9851 .9831 .9805 .9778 .9728 .9673 .9586 .9438 .9212 .8811 .8026"
        ),
    },
    shift=12.0,
    checkpoint="Wan2.2-T2V-A14B",
    warmup={"transformer": 0.4, "transformer_2": 0.4},
)
# No high-noise step is skipped.
_I2V_A14B = CacheRatios(
    {
        "transformer": _numbers(
            ".9919 .9936 .9933 .9925 .9939 .9943 .9928 .9939 .9927 .9932 .9938 .9927 .9922 .9918"
        ),
        "transformer_2": _numbers(
            ".9893 .9909 .9885 .9889 .9881 .9871 .9861 .9843 .9830 .9819 .9813 .9783 .9762 .9726 .9709 .9657 "
            ".9605 .9532 .9458 .9330 .9170 .8917 .8541 .7982"
        ),
    },
    shift=5.0,
    checkpoint="Wan2.2-I2V-A14B",
    warmup={"transformer": 1.0, "transformer_2": 0.1},
)
_TI2V_5B = (
    ".9950 .9944 .9956 .9950 .9953 .9947 .9946 .9946 .9941 .9945 .9941 .9940 .9938 .9935 .9938 .9933 .9930 "
    ".9922 .9920 .9920 .9913 .9911 .9916 .9896 .9896 .9884 .9883 .9883 .9871 .9856 .9851 .9841 .9828 .9810 "
    ".9798 .9785 .9756 .9740 .9717 .9692 "
)
_TI2V_5B_TEXT = CacheRatios(
    {"transformer": _numbers(_TI2V_5B + ".9651 .9626 .9584 .9548 .9494 .9468 .9458 .9484 .9695")},
    shift=5.0,
    checkpoint="Wan2.2-TI2V-5B",
    warmup={"transformer": 0.2},
)
# Those of text, to which its own are equal up to 0.002, but for the last nine.
_TI2V_5B_IMAGE = CacheRatios(
    {"transformer": _numbers(_TI2V_5B + ".9644 .9613 .9564 .9518 .9445 .9397 .9357 .9354 .9666")},
    shift=5.0,
    checkpoint="Wan2.2-TI2V-5B",
    warmup={"transformer": 0.2},
)


def known_ratios(name: str, with_image: bool) -> CacheRatios | None:
    """Return the known ratios of a checkpoint, for videos of text or of an image; None if there are none."""
    if name == _TI2V_5B_TEXT.checkpoint:
        return _TI2V_5B_IMAGE if with_image else _TI2V_5B_TEXT
    for known in (_T2V_A14B, _I2V_A14B):
        if known.checkpoint == name:
            return known
    kind, _, task = name.partition("-")
    file = ASSETS / task / FILE
    return CacheRatios.load(file) if kind == "tiny" and file.is_file() else None
