"""How LoRA files spell their keys: [prefixes] module, part of the adapter, [adapter's name], ["weight"].

Sources: PEFT, diffusers, kohya's sd-scripts and musubi-tuner, Blissful Tuner, LyCORIS, DiffSynth-Studio,
VideoX-Fun, LightX2V; ComfyUI comfy/lora.py and comfy/weight_adapter.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..naming.keys import TRANSFORMER

SLOTS = ("transformer", "transformer_2")
# Names before a module's that say for which expert it is: diffusers', the official folders', DiffSynth's.
_EXPERTS = {
    "transformer_2": SLOTS[1],
    "low_noise_model": SLOTS[1],
    "dit2": SLOTS[1],
    "high_noise_model": SLOTS[0],
}
# What torch and PEFT write at any depth for a module inside another, and programs for the whole model. Of
# experts these say nothing: "transformer." stands in diffusers' files for either.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
_MODELS = {"base_model", "model", "diffusion_model", "transformer", "pipe", "dit", "unet"} | _WRAPPERS
# These programs also write "_" in place of "."; a compiled module's name is among the others then.
_FLAT = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_+(?:(?:diffusion_model|model|module|dit)_)*")
_COMPILED = re.compile(r"_+orig_mod(?=_)")
_KEY = re.compile(
    r"(?P<module>.+?)\."
    r"(?:(?P<matrix>lora_down|lora_A|lora\.down|lora_up|lora_B|lora\.up|lora_magnitude_vector|dora_scale"
    r"|dora_layer|lokr_w[12](?:_[ab])?|hada_w[12]_[ab])(?:\.(?P<rest>.+))?"
    r"|(?P<single>alpha|lora_alpha|diff|diff_b|diff_m|w_norm|b_norm))"
)
# PEFT's names of an adapter's parts; those that are not here have the same name everywhere.
_PEFT = {
    "lora_down": "lora_A",
    "lora.down": "lora_A",
    "lora_up": "lora_B",
    "lora.up": "lora_B",
    "dora_scale": "lora_magnitude_vector",
    "dora_layer": "lora_magnitude_vector",
    "lora_alpha": "alpha",
}
# Whole differences, and the parameters of a module that they are for; "": the module's name is a parameter's.
DELTAS = {
    "diff": (".weight", ""),
    "diff_b": (".bias",),
    "diff_m": (".modulation",),
    "w_norm": (".weight",),
    "b_norm": (".bias",),
}
BIAS = "lora_B.bias"  # PEFT's bias after the second matrix, with the matrices' scale


@dataclass(frozen=True)
class Spelled:
    """What a key says."""

    expert: str | None  # "transformer" or "transformer_2"; None: it names none
    module: str  # without prefixes, under any program's name
    part: str | None  # PEFT's name of it, "alpha", or a name in DELTAS; None: unknown


def read_key(key: str) -> Spelled:
    """Return what a key of a LoRA file says."""
    expert, name = without_prefixes(key)
    match = _KEY.fullmatch(name)
    if match is None:
        return Spelled(expert, name, None)
    part = match["single"] or _PEFT.get(match["matrix"], match["matrix"])
    part = _PEFT.get(part, part)
    if (match["rest"] or "").rpartition(".")[2] == "bias":  # after an adapter's name, or alone
        part = BIAS if part == "lora_B" else None
    return Spelled(expert, match["module"], part)


def without_prefixes(key: str) -> tuple[str | None, str]:
    """Return the expert that a key names, and the key without what is around the module's own name."""
    expert, names = None, [name for name in key.split(".") if name not in _WRAPPERS]
    while names and (names[0] in _MODELS or names[0] in _EXPERTS):
        expert = _EXPERTS.get(names[0], expert)
        del names[0]
    name = ".".join(names)
    if _FLAT.match(name):
        name = _FLAT.sub("", _COMPILED.sub("", name), count=1)
    return expert, name


def names_of(parameters: Iterable[str]) -> dict[str, str]:
    """Return our name of each parameter under all names that files may give it, without prefixes."""
    official = TRANSFORMER.inverse
    names: dict[str, str] = {}
    for ours in parameters:
        for name in {ours, official.rename(ours) or ours}:
            module, dot, attribute = name.rpartition(".")
            flat = f"{module.replace('.', '_')}{dot}{attribute}", name.replace(".", "_")
            names |= dict.fromkeys((name, *flat), ours)
    return names
