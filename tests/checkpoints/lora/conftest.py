"""A small transformer, and a LoRA for it."""

import copy

import pytest

from tests.builders import random_transformer
from tests.checkpoints.lora_writers import make_lora


@pytest.fixture
def model():
    return copy.deepcopy(random_transformer(3)).eval()


@pytest.fixture
def table(model):
    return make_lora(model, 1)
