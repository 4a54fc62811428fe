"""Whole calls against the official code's, from the noise to the frames."""

import pytest
import torch

from tests.builders import golden_transformer, golden_vae, recording
from tests.golden_data import golden, relative_error
from wan22 import FlowMatchDPMSolverScheduler, FlowMatchUniPCScheduler, WanI2VPipeline, WanT2VPipeline

NAMES = ["pipe_t2v_unipc", "pipe_t2v_dpmpp", "pipe_ti2v_text", "pipe_i2v_unipc", "pipe_ti2v_image"]
SOLVERS = {"unipc": FlowMatchUniPCScheduler, "dpm++": FlowMatchDPMSolverScheduler}


def given_image(tensors):
    """The golden call's image as its own resize left it, which is not to be resized again."""
    if "image_resized" in tensors:  # in [-1, 1], with the overshoot of the resampling
        return tensors["image_resized"]
    if "image_cropped_uint8_hwc" in tensors:
        return tensors["image_cropped_uint8_hwc"].numpy()
    return None


class Run:
    """One golden call, repeated here, with all that can be seen of it from outside."""

    def __init__(self, name, pipeline=WanT2VPipeline, resized=True):
        self.description, _, self.tensors = golden(name)
        official = self.description["generate_args"]
        experts = [golden_transformer(model) for model in self.description["models"]]
        two = len(experts) == 2
        image = given_image(self.tensors) if resized else self.tensors["image_uint8_hwc"].numpy()
        pipeline = pipeline if image is None else WanI2VPipeline
        self.pipe = pipeline(
            tokenizer=None,
            text_encoder=None,
            vae=golden_vae(self.description["vae"]),
            scheduler=SOLVERS[self.description["solver"]](),
            **dict(zip(("transformer", "transformer_2"), experts, strict=False)),
            boundary_ratio=self.description["boundary"] if two else None,
            expand_timesteps=not two,
        )
        self.pipe.set_progress_bar_config(disable=True)
        _, _, height, width = self.tensors["video"].shape[-4:]
        size = {"height": height, "width": width} if resized else {"max_area": official["max_area"]}
        scale = official["guide_scale"]
        low, high = scale if isinstance(scale, list) else (None, scale)
        self.predictions, self.latents, self.timesteps = [], [], []
        with recording(self.pipe) as self.calls:
            self._record_predictions()
            self.output = self.pipe(
                **({} if image is None else {"image": image}),
                prompt_embeds=self.tensors["context"][None],
                negative_prompt_embeds=self.tensors["context_null"][None],
                **size,
                num_frames=official["frame_num"],
                num_inference_steps=official["sampling_steps"],
                flow_shift=official["shift"],
                guidance_scale=high,
                guidance_scale_2=low,
                seed=self.description["seed"],
                output_type="latent",
            )

    def _record_predictions(self):
        step = self.pipe.scheduler.step

        def record(prediction, timestep, *args, **kwargs):
            self.predictions.append(prediction[0].clone())
            self.timesteps.append(timestep.item())
            result = step(prediction, timestep, *args, **kwargs)
            self.latents.append(result[0][0].clone())
            return result

        self.pipe.scheduler.step = record


@pytest.fixture(scope="module", params=NAMES)
def run(request):
    return Run(request.param)


def test_starts_from_the_same_noise(run):
    shape = run.pipe.latent_shape(
        run.output.recipe.num_frames, run.output.recipe.height, run.output.recipe.width
    )
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(run.description["seed"]))
    first = 1 if "image_latent" in run.tensors else 0  # the given frame is not noise
    assert torch.equal(noise[:, first:], run.tensors["initial_latent"][:, first:])


def test_first_guided_prediction(run):
    assert run.predictions[0].dtype == torch.float32
    assert relative_error(run.predictions[0], run.tensors["guided_prediction_first_step"]) <= 5e-6


def test_timesteps(run):
    assert run.timesteps == run.description["timesteps"]


def test_expert_of_each_step(run):
    high = run.description["models"][0]
    expected = [
        "transformer" if name == high else "transformer_2" for name in run.description["expert_per_step"]
    ]
    assert [slot for slot, _ in run.calls[::2]] == expected
    assert [slot for slot, _ in run.calls[1::2]] == expected
    assert len(run.calls) == run.description["model_calls"]


def test_latents_after_each_step(run):
    reference = run.tensors["latents_after_each_step"]
    assert len(run.latents) == len(reference)
    errors = [relative_error(ours, official) for ours, official in zip(run.latents, reference, strict=True)]
    assert max(errors) <= 5e-6, errors


def test_final_latents(run):
    assert run.output.frames.dtype == torch.float32
    assert relative_error(run.output.frames[0], run.tensors["final_latent"]) <= 5e-6


def test_video(run):
    frames = run.pipe.decode(run.output.frames, "pt")[0]  # t c h w in [0, 1]
    assert relative_error(frames.transpose(0, 1) * 2 - 1, run.tensors["video"]) <= 1e-5


def test_some_schedule_touches_the_boundary():
    """The tie goes to the high-noise expert; a golden run must hold one, or nothing here would notice."""
    description, _, _ = golden("pipe_t2v_unipc")
    tie = description["timesteps"].index(round(description["boundary"] * 1000))
    assert description["expert_per_step"][tie] == description["models"][0]


@pytest.mark.parametrize("name", ["pipe_i2v_unipc", "pipe_ti2v_image"])
def test_from_the_original_image(name):
    """Size, resize and crop are the official ones where nothing is given but the image."""
    run = Run(name, resized=False)
    assert run.output.frames.shape[1:] == run.tensors["final_latent"].shape
    assert relative_error(run.output.frames[0], run.tensors["final_latent"]) <= 5e-6


def test_text_alone_through_the_image_pipeline():
    run = Run("pipe_ti2v_text", WanI2VPipeline)
    assert type(run.pipe) is WanI2VPipeline
    assert relative_error(run.output.frames[0], run.tensors["final_latent"]) <= 5e-6
