"""Trainings of a few steps: what they write, that they go on to the bit, and what they refuse."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.accel.parallel.ranks import on_ranks
from tests.training.conftest import clips_of, settings
from wan22.accel.quantize import dequantize
from wan22.checkpoints.quantized_linear import QuantizedLinear
from wan22.training.data.cached import CachedClips
from wan22.training.loop import Training, turns
from wan22.training.samples import Drawing

pytestmark = pytest.mark.usefixtures("encoded")

FILES = {"t2v": ["lora_high_noise", "lora_low_noise"], "i2v": ["lora_high_noise", "lora_low_noise"]}
FILES["ti2v"] = ["lora"]


def train(config, **options):
    return Training(config, **options).run()


def weights_in(folder, kind="t2v"):
    return [load_file(folder / f"{name}.safetensors") for name in FILES[kind]]


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def stopped_after(config, steps):
    """Train so many steps, and stop."""
    training = Training(config)
    log = training._log

    def counted(*args):
        log(*args)
        if training.step == steps:
            training.stop()

    training._log = counted
    assert training.run().stopped


# ---- what comes out ----


@pytest.mark.parametrize("kind", FILES)
def test_losses_fall_and_files_are_written(kind, tmp_path):
    """A clip that is always seen is learnt; its loss at fixed noise says so."""
    config = settings(
        tmp_path / "out", kind, clips=1, steps=8, switch_every=4, validation=f"{kind}-1", validate_every=1
    )
    result = train(config)
    assert sorted(path.stem for path in result.files.values()) == FILES[kind]
    lines = [json.loads(line) for line in (tmp_path / "out" / "losses.jsonl").read_text().splitlines()]
    validations = [line["validation"] for line in lines if "validation" in line]
    for slot, last in result.validation.items():
        assert last < 0.97 * validations[0][slot]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 8 * len(FILES[kind]) + 1))
    kept = sorted(path.name for path in (tmp_path / "out" / "steps").iterdir())
    assert len(kept) == config.keep and int(kept[-1]) == result.steps == steps[-1]


def test_experts_are_trained_in_turn():
    assert turns(2, 5, 2) == [0, 0, 1, 1, 0, 0, 1, 1, 0, 1]
    assert turns(1, 3, 2) == [0, 0, 0]


def test_an_expert_is_trained_alone(tmp_path):
    result = train(settings(tmp_path, expert="low"))
    assert list(result.files) == ["transformer_2"] and result.steps == 4
    assert not (tmp_path / "lora_high_noise.safetensors").exists()


def test_each_expert_sees_its_own_noise_levels(tmp_path, monkeypatch):
    from wan22.training import trainee

    seen = {}
    original = trainee.losses

    def spy(model, batch, noise, sigma):
        seen.setdefault(id(model), []).append(sigma)
        return original(model, batch, noise, sigma)

    monkeypatch.setattr(trainee, "losses", spy)
    training = Training(settings(tmp_path))
    training.run()
    high, low = (torch.cat(seen[id(t.model)]) for t in training.trainees)
    assert high.min() >= 0.875 > low.max()


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_every_method_trains(method, tmp_path):
    before, after = (train(settings(tmp_path / str(n), method=method, steps=n, expert="low")) for n in (1, 6))
    assert before.files and after.loss["transformer_2"] != before.loss["transformer_2"]
    tensors = load_file(after.files["transformer_2"])
    assert all(name.startswith("diffusion_model.blocks.") for name in tensors)
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_all_weights_of_a_small_model(tmp_path):
    from wan22 import WanTransformer3DModel

    config = settings(tmp_path, "ti2v", method="full", steps=2, learning_rate=1e-3)
    result = train(config)
    loaded = WanTransformer3DModel.from_pretrained(result.files["transformer"])
    training = Training(config, resume=True)
    state = training.base.pipe.transformer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    original = WanTransformer3DModel.from_pretrained(config.model, subfolder="transformer")
    assert not torch.equal(original.float().proj_out.weight, loaded.proj_out.weight)


# ---- it goes on to the bit ----

VARIANTS = {
    "plain": {},
    "accumulated": {"accumulation": 2, "batch_size": 1},
    "averaged": {"ema": 0.9, "schedule": "cosine", "warmup": 1},
    "with dropout": {"dropout": 0.3},
    "weighted": {"weighting": "bell", "strata": 3},
}


@pytest.mark.parametrize(
    ("variant", "steps"), [("plain", 1), ("plain", 5), *((name, 3) for name in VARIANTS if name != "plain")]
)
def test_a_resumed_training_is_the_uninterrupted_one(variant, steps, tmp_path):
    whole = settings(tmp_path / "whole", **VARIANTS[variant])
    train(whole)
    config = whole.changed(output=str(tmp_path / "parts"))
    stopped_after(config, steps)
    torch.rand(7)  # whatever has been drawn meanwhile
    train(config, resume=True)
    assert_equal(weights_in(tmp_path / "parts"), weights_in(tmp_path / "whole"))
    logs = [(tmp_path / name / "losses.jsonl").read_text() for name in ("parts", "whole")]
    assert logs[0] == logs[1]


def test_a_longer_training_goes_on_from_a_finished_one(tmp_path):
    short = settings(tmp_path / "out", steps=2)
    train(short)
    train(short.changed(steps=4), resume=True)
    train(settings(tmp_path / "whole"))
    assert_equal(weights_in(tmp_path / "out"), weights_in(tmp_path / "whole"))


def test_checkpointing_changes_no_bit(tmp_path):
    for checkpointing in (True, False):
        train(settings(tmp_path / str(checkpointing), checkpointing=checkpointing, expert="high"))
    found, expected = (
        load_file(tmp_path / name / "lora_high_noise.safetensors") for name in ("True", "False")
    )
    assert_equal([found], [expected])


def test_the_process_keeps_its_random_numbers(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(settings(tmp_path, dropout=0.2))
    assert torch.equal(torch.rand(2), expected)


def test_validation_depends_on_its_clips_alone(tmp_path):
    """Before the first step, whatever else is set: LoRAs add nothing yet."""
    found = []
    for number, changes in enumerate(({}, {"seed": 5, "caption_dropout": 0.9, "batch_size": 1})):
        training = Training(settings(tmp_path / str(number), validation="t2v-2", **changes))
        found.append(training._validate(None))
    assert found[0] == found[1] and set(found[0]) == {"transformer", "transformer_2"}


# ---- several processes ----


def _trained_as_rank(rank, folder):
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "ACCELERATE_USE_CPU": "true"}
    CachedClips.open = staticmethod(clips_of)
    training = Training(settings(folder, batch_size=1, accumulation=2))
    training.run()
    return {
        f"{trainee.slot}.{name}": p.detach()
        for trainee in training.trainees
        for name, p in trainee.trained.items()
    }


def test_two_processes_train_as_one_that_accumulates(tmp_path):
    ranks = on_ranks(2, _trained_as_rank, str(tmp_path / "two"))
    one = Training(settings(tmp_path / "one", batch_size=1, accumulation=4))
    one.run()
    for trainee in one.trainees:
        for name, expected in trainee.trained.items():
            found = [rank[f"{trainee.slot}.{name}"] for rank in ranks]
            assert torch.equal(found[0], found[1])
            # Adam divides gradients by their own size: of those near 0, rounding is left.
            torch.testing.assert_close(found[0], expected.detach(), rtol=1e-4, atol=1e-3 * 1e-2)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "losses.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


# ---- the frozen base ----


@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_gradients_on_a_quantised_base_are_those_on_the_expanded_one(method, tmp_path):
    gradients = []
    for expanded in (False, True):
        training = Training(settings(tmp_path / str(expanded), quantize=method, expert="high"))
        (trainee,) = training.trainees
        if expanded:
            base = training.base.pipe.transformer
            for layer in list(base.modules()):
                if hasattr(layer, "base_layer"):
                    dequantize(layer)
            assert not any(isinstance(module, QuantizedLinear) for module in base.modules())
        sigma = torch.tensor([0.9, 0.95], dtype=torch.float64)
        trainee.losses_of(training.base.clips, Drawing(0), [0, 1], [0, 1], sigma).mean().backward()
        gradients.append({name: p.grad for name, p in trainee.trained.items()})
    for name, found in gradients[0].items():
        torch.testing.assert_close(found, gradients[1][name], rtol=1e-5, atol=1e-8)


# ---- what is refused ----


def test_what_is_there_is_not_overwritten(tmp_path):
    config = settings(tmp_path, steps=2)
    train(config)
    with pytest.raises(FileExistsError, match=r"has a training, saved at step 4; resume it"):
        Training(config)
    for change, message in (
        ({"rank": 4}, "was trained with rank=2, and rank=4 is given"),
        ({"data": "t2v-4"}, "was trained with data='t2v-5'"),
        ({"schedule": "cosine"}, "schedule='constant'"),
    ):
        with pytest.raises(ValueError, match=message):
            Training(config.changed(**change), resume=True)


def test_other_clips_are_not_gone_on_with(tmp_path, monkeypatch):
    config = settings(tmp_path, steps=2)
    train(config)
    monkeypatch.setattr(CachedClips, "open", staticmethod(lambda folder: clips_of("t2v-3")))
    with pytest.raises(ValueError, match="was trained on other clips than t2v-5 has now"):
        Training(config, resume=True)


@pytest.mark.parametrize(
    ("kind", "clips", "message"),
    [
        ("t2v", "ti2v-2", "ti2v-2 has latents of 48 channels"),
        ("ti2v", "t2v-2", "t2v-2 has latents of 16 channels"),
        ("t2v", "i2v-2", "i2v-2 has clips for i2v checkpoints: .*t2v is a checkpoint for"),
        ("i2v", "t2v-2", "t2v-2 has clips for t2v checkpoints: .*i2v is a checkpoint for"),
    ],
)
def test_clips_of_another_checkpoint_are_refused(kind, clips, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Training(settings(tmp_path, kind, data=clips))


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    training = Training(settings(tmp_path, expert="low"))
    next(iter(training.trainees[0].trained.values())).data.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"step 1, low noise: the loss is nan; a lower learning_rate"
    ):
        training.run()


def test_a_damaged_state_is_named(tmp_path):
    config = settings(tmp_path, steps=2)
    train(config)
    (tmp_path / "steps" / "000004" / "state.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"state.pt cannot be read.*remove its folder"):
        Training(config, resume=True)


def test_headers_tell_what_was_trained(tmp_path):
    train(settings(tmp_path, name="style", steps=2))
    with safe_open(tmp_path / "style_low_noise.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.timestep_range"] == "0,875"
    assert metadata["ss_base_model_version"] == "tiny-t2v"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "2"
    assert metadata["ss_steps"] == "2" and metadata["wan22.expert"] == "low noise"
    assert json.loads(metadata["wan22.settings"])["name"] == "style"
