"""A small pipeline, LoRAs for its two experts, and what it computes without and with them."""

import copy

import pytest

from tests.builders import latents_of, random_pipeline
from tests.checkpoints.lora_writers import make_lora
from tests.pipelines.attached.merged_loras import SLOTS, merged


@pytest.fixture
def pipe():
    return copy.deepcopy(random_pipeline())


@pytest.fixture(scope="module")
def tables():
    pipe = random_pipeline()
    return {slot: make_lora(getattr(pipe, slot), i) for i, slot in enumerate(SLOTS)}


@pytest.fixture(scope="module")
def plain():
    return latents_of(random_pipeline())


@pytest.fixture(scope="module")
def both(tables):
    return merged((1, 1), tables)
