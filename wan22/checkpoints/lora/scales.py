"""The factor of a LoRA's matrices, wherever it is written: alpha / r, or alpha / sqrt(r) if rank-stabilised.

Sources: PEFT tuners/lora/layer.py (update_layer) and utils/other.py (get_pattern_key); diffusers
loaders/lora_base.py (lora_adapter_metadata); kohya's sd-scripts networks/lora.py; musubi-tuner
convert_lora.py; Blissful Tuner networks/lora.py (use_rslora_flag); LyCORIS modules/lokr.py.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...checks import check_positive_int, check_real, cut, shown
from ..files.weights import WeightFile
from .spellings import SLOTS, without_prefixes
from .weights import AdapterWeights

logger = logging.getLogger(__name__)

HEADER = "lora_adapter_metadata"  # diffusers' entry in a file's header: PEFT's configuration
CONFIG = "adapter_config.json"  # PEFT's file of it, beside the weights
_KOHYA = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
_KINDS = {"LORA", "LOHA", "LOKR"}
# Settings of PEFT's that add to a LoRA what is not in its matrices, or change the weights beneath it.
_UNREAD = (
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_CHANGE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Patterns:
    """PEFT's values for some modules, by regular expressions for the ends of their names."""

    values: tuple[tuple[re.Pattern[str], float], ...] = ()

    def value(self, names: Iterable[str]) -> float | None:
        """Return the first pattern's value that fits a module, which has all of these names."""
        names = list(names)
        return next((v for pattern, v in self.values if any(map(pattern.fullmatch, names))), None)


@dataclass(frozen=True)
class Scaling:
    """What is written of the factor, and where."""

    place: str
    alpha: float | None = None  # None: r
    rank: int | None = None  # None: the matrices' own
    stabilised: bool = False
    alphas: Patterns = field(default_factory=Patterns)
    ranks: Patterns = field(default_factory=Patterns)
    binding: bool = True  # PEFT's; of others, another rank than the matrices' makes the alpha void

    def alpha_of(self, weights: AdapterWeights, names: Iterable[str]) -> float | None:
        """Return the alpha whose quotient by the matrices' rank is the factor; None: the rank.

        `names` are all those of the module. A ValueError says that the matrices have another rank.
        """
        if weights.whole and not self.binding:
            return None  # LyCORIS takes 1
        names = list(names)
        stated = self.ranks.value(names) or self.rank
        rank = stated or weights.rank if weights.whole else weights.rank
        if stated not in (None, rank):
            what = f"{self.place} says rank {stated:g}, but the matrices have {rank}"
            if self.binding:
                raise ValueError(f"{what}; for matrices with alpha = rank, give the table of tensors alone")
            logger.warning("%s; its alpha is not used", what)
            return None
        alpha = self.alphas.value(names)
        alpha = self.alpha if alpha is None else alpha
        alpha = rank if alpha is None else alpha
        return alpha * weights.rank / (math.sqrt(rank) if self.stabilised else rank)


def written_scaling(file: WeightFile, slot: str) -> Scaling | None:
    """Return what is written beside the tensors for a transformer's LoRA; None: nothing.

    A ValueError says that the configuration is damaged, or describes more than LoRA, LoHa or LoKr.
    """
    for place, table in ((HEADER, _header_config(file)), (CONFIG, file.metadata.get(CONFIG))):
        if table is not None and (config := _section(table, slot)):
            try:
                return _peft_scaling(place, config, file)
            except ValueError as error:
                raise ValueError(f"{file.source}: {place}: {error}") from error
    return _kohya_scaling(file)


def stabilised_alpha(weights: AdapterWeights, alpha: float) -> float:
    """Return the alpha whose quotient by the rank is alpha / sqrt(r)."""
    return alpha * math.sqrt(weights.rank)


def check_strength(value: Any, name: str = "strength") -> float:
    """Return a LoRA's strength as a float; a ValueError refuses what is no finite number."""
    return float(check_real(name, value, hint="1 is the LoRA as it was trained"))


# ---- PEFT ----


def _header_config(file: WeightFile) -> Mapping[str, Any] | None:
    """Return PEFT's configuration in a header: JSON in one entry, or entries of its own."""
    text = file.metadata.get(HEADER)
    if text:
        try:
            table = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file.source}: {HEADER} in the header is no JSON: {error}") from error
        if not isinstance(table, dict):
            raise ValueError(f"{file.source}: {HEADER} in the header is a {type(table).__name__}, no table")
        if table:
            return table
    if "lora_alpha" not in file.metadata:
        return None
    rank = next((file.metadata[name] for name in ("r", "lora_rank", "rank") if name in file.metadata), None)
    return {"lora_alpha": _number_in(file.metadata["lora_alpha"]), "r": _number_in(rank)}


def _section(table: Mapping[str, Any], slot: str) -> dict[str, Any]:
    """Return the settings for a transformer: those that name no model, and before them those that name it."""
    plain, own = {}, {}
    for key, value in table.items():
        expert, name = without_prefixes(key)
        if name == key:
            plain[name] = value
        elif (expert or SLOTS[0]) == slot:
            own[name] = value
    return plain | own


def _peft_scaling(place: str, config: Mapping[str, Any], file: WeightFile) -> Scaling:
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind not in _KINDS:
        raise ValueError(f"peft_type is {cut(kind)}; {', '.join(sorted(_KINDS))} are read")
    if unread := [name for name in _UNREAD if config.get(name)]:
        raise ValueError(f"{unread[0]} is {shown(config[unread[0]])}; such LoRAs are not read")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGE_WEIGHTS):
        raise ValueError(
            f"init_lora_weights is {cut(start)}, which changes the model's own weights; convert the LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    bias = config.get("bias") or "none"
    if bias != "none" and any(key.endswith(".bias") and ".lora_" not in key for key in file.tensors):
        raise ValueError(f"bias is {cut(bias)}; whole biases are not read")
    magnitudes = ("lora_magnitude_vector", "dora_scale", "dora_layer")
    if config.get("use_dora") and not any(name in key for key in file.tensors for name in magnitudes):
        raise ValueError("use_dora is set, but the magnitudes are not there")
    alpha, rank = config.get("lora_alpha"), config.get("r")
    alpha = config.get("alpha") if alpha is None else alpha  # LoHa's and LoKr's
    return Scaling(
        place,
        None if alpha is None else check_real("lora_alpha", alpha),
        None if rank is None else check_positive_int("r", rank),
        bool(config.get("use_rslora")),
        _patterns("alpha_pattern", config, check_real),
        _patterns("rank_pattern", config, check_positive_int),
    )


def _patterns(name: str, config: Mapping[str, Any], check: Callable[[str, Any], float]) -> Patterns:
    table = config.get(name) or {}
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} is a {type(table).__name__}, no table")
    values = []
    for pattern, value in table.items():
        number = check(f"{name} of {cut(pattern)}", value)
        try:
            values.append((re.compile(rf"(?:.*\.)?(?:{pattern})"), number))
        except re.error as error:
            raise ValueError(f"{name}: {cut(pattern)} is no regular expression: {error}") from error
    return Patterns(tuple(values))


# ---- kohya's header ----


def _kohya_scaling(file: WeightFile) -> Scaling | None:
    """Return what a header of kohya's family says, if there are no alphas among the tensors.

    Where musubi-tuner converts a LoRA to lora_A and lora_B, it multiplies these by the factor and leaves the
    header as it was, with the name of the trainer's module.
    """
    module, rank, alpha, options = (file.metadata.get(name) for name in _KOHYA)
    number = _number_in(alpha)
    if not number or any(key.endswith(".alpha") for key in file.tensors):
        return None
    if module and any(".lora_A" in key for key in file.tensors):
        logger.info("%s: ss_network_alpha=%s is in its converted matrices", file.source, alpha)
        return None
    known = _number_in(rank)
    return Scaling(
        "ss_network_dim",
        number,
        known if isinstance(known, int) and known > 0 else None,
        bool(re.search(r'"(use_rslora|rs_lora)": *"?(true|1|yes|on)\b', str(options), re.IGNORECASE)),
        binding=False,
    )


def _number_in(text: Any) -> float | None:
    """Return the number that an entry of a header is; None for words, such as "None" or "Dynamic"."""
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return (int(number) if number.is_integer() else number) if math.isfinite(number) else None
