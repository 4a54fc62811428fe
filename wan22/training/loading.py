"""The frozen checkpoint that is trained for, and the clips."""

import hashlib
from dataclasses import replace
from typing import Any

import torch

from ..checks import cut
from ..pipelines.i2v import WanI2VPipeline
from ..pipelines.loading.load import check_kind, locate
from ..pipelines.t2v import WanT2VPipeline
from .config import TrainConfig
from .data.cached import CachedClips
from .timesteps import Timesteps
from .trainee import Trainee

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LABELS = {"transformer": "high noise", "transformer_2": "low noise"}
# Trainers' usual shifts; their samples favour high noise, where layout and motion are decided.
SHIFTS = {"Wan2.2-T2V-A14B": 12.0, "Wan2.2-I2V-A14B": 5.0, "Wan2.2-TI2V-5B": 5.0}


def shift_of(pipe: Any, config: TrainConfig) -> float:
    """Return the shift of noise levels for a pipeline's checkpoint."""
    given = config.shift
    return SHIFTS.get(pipe.checkpoint_name, pipe.preset.flow_shift) if given is None else given


def timesteps_of(pipe: Any, config: TrainConfig) -> dict[str, Timesteps]:
    """Return the noise levels of the transformers that are trained, by slot."""
    boundary = pipe.config.boundary_ratio
    spans = {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}
    chosen = {"both": list(spans), "high": ["transformer"], "low": ["transformer_2"]}[config.expert]
    if boundary is None:
        spans, chosen = {"transformer": (0.0, 1.0)}, ["transformer"]
    whole = Timesteps(config.sampling, shift_of(pipe, config), config.mean, config.std, strata=config.strata)
    return {slot: replace(whole, low=spans[slot][0], high=spans[slot][1]) for slot in chosen}


class Base:
    """A checkpoint's transformers, in a pipeline without text encoder and autoencoder, and cached clips.

    Raises: ValueError: the clips were encoded for another checkpoint.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.clips = CachedClips.open(config.data)
        self.pipe: Any = self._load()
        self.name: str = self.pipe.checkpoint_name
        self.experts = 1 if self.pipe.config.boundary_ratio is None else 2
        self.check_clips(config.data, self.clips)
        names = [f"{item.file.name} {item.repeats}" for item in self.clips.items]
        self.fingerprint = hashlib.sha256("\n".join(names).encode()).hexdigest()

    @property
    def image_to_video(self) -> bool:
        """Whether clips come with the channels of an image."""
        return self.clips.read(0).condition is not None

    @property
    def first_frame(self) -> float:
        """Share of samples whose first frame is given: of checkpoints with a timestep per token alone."""
        return self.config.first_frame if self.pipe.config.expand_timesteps else 0.0

    @property
    def facts(self) -> dict[str, Any]:
        """What the header of a file tells of the data."""
        return {
            "ss_num_train_items": len(self.clips),
            "ss_discrete_flow_shift": shift_of(self.pipe, self.config),
            "ss_sd_model_name": self.name,
        }

    def trainees(self) -> list[Trainee]:
        """Return the transformers with what is trained of them."""
        label = LABELS if self.experts == 2 else {}
        return [
            Trainee(slot, label.get(slot, ""), getattr(self.pipe, slot), self.config, timesteps)
            for slot, timesteps in timesteps_of(self.pipe, self.config).items()
        ]

    def check_clips(self, folder: str, clips: CachedClips) -> None:
        """Refuse clips that were encoded for another checkpoint."""
        model = self.pipe.any_transformer.config
        sample = clips.read(0)
        extra = 0 if sample.condition is None else len(sample.condition)
        found = len(sample.latents), extra, sample.text.shape[1]
        wanted = self.pipe.latent_channels, model.in_channels - self.pipe.latent_channels, model.text_dim
        if found != wanted:
            raise ValueError(
                f"{cut(folder)} has latents of {found[0]} channels, conditions of {found[1]}, text of width "
                f"{found[2]}; {self.name} takes {wanted[0]}, {wanted[1]}, {wanted[2]}: cache clips for it"
            )

    def _load(self) -> Any:
        config = self.config
        without = ["text_encoder", "tokenizer"]
        if config.sample_prompts is None:
            without += [
                "vae",
                *{"both": (), "high": ["transformer_2"], "low": ["transformer"]}[config.expert],
            ]
        dtype = {"default": DTYPES[config.dtype], "vae": torch.float32}
        cls: Any = WanI2VPipeline if self.image_to_video else WanT2VPipeline
        try:
            check_kind(cls, locate(config.model, {}))
        except ValueError as error:
            kind = self.clips.checkpoint["kind"]
            raise ValueError(f"{cut(config.data)} has clips for {kind} checkpoints: {error}") from error
        return cls.from_pretrained(
            config.model, dtype=dtype, quantize=config.quantize, **dict.fromkeys(without)
        )

    def text_pipeline(self) -> Any:
        """Return a pipeline of the text encoder alone."""
        without = dict.fromkeys(("transformer", "transformer_2", "vae"))
        return type(self.pipe).from_pretrained(self.config.model, dtype=DTYPES[self.config.dtype], **without)
