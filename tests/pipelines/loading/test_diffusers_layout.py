"""Folders and repositories in the Diffusers layout: read with our classes, written for plain diffusers."""

import copy
import json
import logging
import shutil

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import wan22
from tests.builders import MODELS, SMALL, latents_of, load_pipeline, random_components, random_pipeline
from tests.pipelines.loading.repositories import make_repository
from wan22 import (
    AutoencoderKLWan,
    FlowMatchDPMSolverScheduler,
    FlowMatchEulerScheduler,
    FlowMatchUniPCScheduler,
    WanT2VPipeline,
    WanTransformer3DModel,
)


def read_json(path):
    return json.loads(path.read_text())


def edit_json(path, **changed):
    values = {**read_json(path), **changed}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved pipeline that a test may change."""
    return shutil.copytree(saved, tmp_path / "copy")


# ---- what is written ----


def test_model_index_has_diffusers_names(saved):
    index = read_json(saved / "model_index.json")
    assert index["_class_name"] == "WanPipeline"
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    assert index["transformer"] == index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]
    assert index["text_encoder"] == ["transformers", "UMT5EncoderModel"]
    assert (index["boundary_ratio"], index["expand_timesteps"]) == (0.875, False)
    assert index["_wan22_version"] == wan22.__version__


@pytest.mark.parametrize(
    ("ours", "theirs", "shift"),
    [
        (FlowMatchUniPCScheduler, "UniPCMultistepScheduler", "flow_shift"),
        (FlowMatchDPMSolverScheduler, "DPMSolverMultistepScheduler", "flow_shift"),
        (FlowMatchEulerScheduler, "FlowMatchEulerDiscreteScheduler", "shift"),
    ],
)
def test_schedulers_go_there_and_back(ours, theirs, shift, tmp_path):
    random_pipeline(scheduler=ours(shift=7.0)).save_pretrained(tmp_path / "ours")
    assert read_json(tmp_path / "ours/model_index.json")["scheduler"] == ["diffusers", theirs]
    config = read_json(tmp_path / "ours/scheduler/scheduler_config.json")
    assert (config["_class_name"], config[shift]) == (theirs, 7.0)
    plain = diffusers.WanPipeline.from_pretrained(tmp_path / "ours")
    assert type(plain.scheduler) is getattr(diffusers, theirs)
    assert plain.scheduler.config[shift] == 7.0
    plain.save_pretrained(tmp_path / "theirs")
    assert type(load_pipeline(tmp_path / "ours").scheduler) is ours
    # Whose arithmetic it was saved with is whose it is loaded with; diffusers' UniPC stands for the official.
    back = load_pipeline(tmp_path / "theirs").scheduler
    assert type(back) is (ours if ours is FlowMatchUniPCScheduler else type(plain.scheduler))
    assert back.config[shift] == 7.0


@pytest.mark.parametrize(
    "form", [{}, {"experts": 1}, {"experts": 1, "channels": 48}], ids=["a14b", "2.1", "5b"]
)
def test_ours_to_diffusers_to_ours(form, tmp_path):
    ours = random_pipeline(**form)
    ours.save_pretrained(tmp_path / "ours")

    plain = diffusers.WanPipeline.from_pretrained(tmp_path / "ours")
    for name in ("vae", "transformer", "transformer_2"):
        model = getattr(plain, name)
        assert model is None or type(model) is getattr(diffusers, type(getattr(ours, name)).__name__)
    assert plain.config.boundary_ratio == ours.config.boundary_ratio
    assert plain.config.expand_timesteps == ours.config.expand_timesteps
    plain.save_pretrained(tmp_path / "theirs")

    back = load_pipeline(tmp_path / "theirs")
    for name in ("vae", "transformer", "transformer_2"):
        model, original = getattr(back, name), getattr(ours, name)
        assert type(model) is type(original)
        if model is not None:
            weights = original.state_dict()
            assert model.state_dict().keys() == weights.keys()
            assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    size = {**SMALL, "guidance_scale_2": None, "seed": 7}
    before, after = ours("a red circle", **size), back("a red circle", **size)
    assert (before.frames == after.frames).all()
    assert torch.equal(latents_of(back), latents_of(ours))
    assert before.recipe.flow_shift == after.recipe.flow_shift == 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_that_weights_lie_in_changes_no_bit(dtype, tmp_path):
    """Files put the same weights at other addresses, at which CPU kernels would round differently."""
    source = wan22.tiny_checkpoint()
    arguments = {"seed": 1, "num_inference_steps": 2, "output_type": "latent"}
    dtypes = {"default": dtype, "vae": torch.float32}
    WanT2VPipeline.from_pretrained(source, dtype=dtypes).save_pretrained(tmp_path / "ours")
    plain = diffusers.WanPipeline.from_pretrained(tmp_path / "ours", dtype=dtypes)
    plain.save_pretrained(tmp_path / "theirs")
    results = []
    for folder in (source, tmp_path / "ours", tmp_path / "theirs"):
        pipe = load_pipeline(folder, dtype=dtypes)
        results.append(pipe("a red circle moves to the right on a blue background", **arguments).frames)
        assert all(p.data_ptr() % 64 == 0 for p in pipe.transformer.parameters())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_diffusers_says_nothing_about_our_folder(saved, caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        diffusers.WanPipeline.from_pretrained(saved)
        load_pipeline(saved)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [r.message for r in caplog.records if r.levelno >= logging.WARNING]


def test_shards(saved, tmp_path):
    pipe = random_pipeline()
    pipe.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert torch.equal(latents_of(load_pipeline(tmp_path)), latents_of(pipe))


# ---- what is read ----


def test_our_classes(saved):
    pipe = load_pipeline(saved)
    assert type(pipe) is WanT2VPipeline
    assert type(pipe.transformer) is type(pipe.transformer_2) is WanTransformer3DModel
    assert type(pipe.vae) is AutoencoderKLWan
    assert type(pipe.scheduler) is FlowMatchUniPCScheduler
    assert isinstance(pipe.text_encoder, transformers.UMT5EncoderModel)
    assert not any(getattr(pipe, name).training for name in MODELS)
    assert pipe.checkpoint_name == str(saved)
    assert torch.equal(latents_of(pipe), latents_of(random_pipeline()))


def test_a_path_object_and_a_string_are_the_same(saved):
    assert load_pipeline(str(saved)).config._name_or_path == load_pipeline(saved).config._name_or_path


def test_the_two_experts_are_not_mixed_up(saved):
    pipe, original = load_pipeline(saved), random_components()
    for name in ("transformer", "transformer_2"):
        assert torch.equal(getattr(pipe, name).proj_out.weight, original[name].proj_out.weight)
    assert not torch.equal(pipe.transformer.proj_out.weight, pipe.transformer_2.proj_out.weight)


def test_the_text_encoders_embedding_is_loaded(saved):
    """Some transformers releases left it zero or random."""
    encoder, original = load_pipeline(saved).text_encoder, random_components()["text_encoder"]
    assert torch.equal(encoder.get_input_embeddings().weight, original.shared.weight)
    assert torch.equal(encoder.encoder.embed_tokens.weight, original.shared.weight)


# ---- dtypes ----


def test_the_default_is_the_stored_dtype(saved_bf16):
    pipe = load_pipeline(saved_bf16)
    assert pipe.transformer.dtype == pipe.transformer_2.dtype == torch.bfloat16
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.text_encoder.shared.weight.dtype == torch.bfloat16
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}


def test_some_modules_stay_float32(saved, saved_bf16):
    for source in (saved, saved_bf16):
        transformer = load_pipeline(source, dtype=torch.bfloat16).transformer
        wide = {name for name, p in transformer.named_parameters() if p.dtype == torch.float32}
        assert {"scale_shift_table", "blocks.0.scale_shift_table", "blocks.0.norm2.weight"} <= wide
        assert not any(".attn1.to_" in name or ".ffn." in name for name in wide)
        # What is bf16 in the file would gain nothing: these layers widen their weights themselves.
        assert ("condition_embedder.time_proj.weight" in wide) is (source == saved)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_one_dtype_for_all(argument, saved, saved_bf16):
    pipe = load_pipeline(saved, **{argument: torch.bfloat16})
    assert {getattr(pipe, name).dtype for name in MODELS} == {torch.bfloat16}
    pipe = load_pipeline(saved_bf16, **{argument: torch.float32})
    assert {getattr(pipe, name).dtype for name in MODELS} == {torch.float32}


def test_a_dtype_for_each_component(saved):
    pipe = load_pipeline(saved, dtype={"transformer": torch.bfloat16, "default": torch.float16})
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.transformer_2.dtype == pipe.vae.dtype == torch.float16


def test_a_bf16_round_trip(saved_bf16, tmp_path):
    reference = latents_of(load_pipeline(saved_bf16))
    diffusers.WanPipeline.from_pretrained(saved_bf16, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert torch.equal(latents_of(load_pipeline(tmp_path)), reference)
    assert reference.dtype == torch.float32


def test_an_encoder_in_two_dtypes(saved_bf16, tmp_path):
    """As some versions of transformers save umT5 in bf16: it gets the dtype of most of its weights."""
    folder = shutil.copytree(saved_bf16, tmp_path / "copy")
    reference = latents_of(load_pipeline(saved_bf16))
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    weights = {n: t.float() if ".wo." in n else t.clone() for n, t in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    pipe = load_pipeline(folder)
    assert {p.dtype for p in pipe.text_encoder.parameters()} == {torch.bfloat16}
    assert torch.equal(latents_of(pipe), reference)


def test_variant(folder):
    half = {name: copy.deepcopy(random_components()[name]).half() for name in MODELS}
    random_pipeline(**half).save_pretrained(folder, variant="fp16")
    assert {p.name for p in (folder / "vae").glob("*.safetensors")} == {
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
    }
    assert {getattr(load_pipeline(folder, variant="fp16"), name).dtype for name in MODELS} == {torch.float16}
    assert {getattr(load_pipeline(folder), name).dtype for name in MODELS} == {torch.float32}


# ---- repositories ----


def test_a_cached_repository(saved, saved_bf16, tmp_path, pipe):
    make_repository(tmp_path, "org/name", {"main": saved, "half": saved_bf16})
    arguments = {"cache_dir": tmp_path, "local_files_only": True}
    loaded = load_pipeline("org/name", **arguments)
    assert torch.equal(latents_of(loaded), latents_of(pipe))
    assert loaded.checkpoint_name == "org/name"
    assert loaded.transformer.dtype == torch.float32
    assert load_pipeline("org/name", revision="half", **arguments).transformer.dtype == torch.bfloat16
    partial = load_pipeline("org/name", vae=pipe.vae, transformer_2=None, **arguments)
    assert partial.vae is pipe.vae
    assert partial.transformer_2 is None


def test_a_repository_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="org/nothing is not in the cache, and local_files_only=True"):
        WanT2VPipeline.from_pretrained("org/nothing", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/model", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(
        FileNotFoundError, match=f"no folder {name}, and a repository's name is like org/name"
    ):
        WanT2VPipeline.from_pretrained(name)


# ---- the shift of converted repositories ----


def as_converted(folder, shift):
    """What diffusers' conversion script leaves: no mark of ours, and one shift for all."""
    edit_json(folder / "model_index.json", _wan22_version=...)
    edit_json(folder / "scheduler/scheduler_config.json", flow_shift=shift)
    return folder


def test_the_shift_of_a_converted_release_is_corrected(folder, tiny_preset, caplog):
    as_converted(folder, 3.0)
    with caplog.at_level(logging.INFO, logger="wan22"):
        pipe = load_pipeline(folder)
    assert pipe.scheduler.config.shift == tiny_preset.flow_shift == 5.0
    assert "flow_shift 3 replaced by random-t2v's 5" in caplog.text
    assert pipe("a", output_type="latent").recipe.flow_shift == 5.0


def test_any_other_shift_is_somebodys_choice(folder, tiny_preset):
    assert load_pipeline(as_converted(folder, 7.0)).scheduler.config.shift == 7.0


def test_a_shift_that_we_saved_is_kept(tiny_preset, tmp_path):
    random_pipeline(scheduler=FlowMatchUniPCScheduler(shift=3.0)).save_pretrained(tmp_path)
    assert load_pipeline(tmp_path).scheduler.config.shift == 3.0


def test_a_given_scheduler_is_kept(folder, tiny_preset):
    pipe = load_pipeline(as_converted(folder, 3.0), scheduler=FlowMatchUniPCScheduler(shift=3.0))
    assert pipe.scheduler.config.shift == 3.0


def test_the_shift_of_an_unknown_checkpoint_is_kept(folder):
    assert load_pipeline(as_converted(folder, 3.0)).scheduler.config.shift == 3.0


def test_the_shift_of_another_solver_is_somebodys_choice(folder, tiny_preset):
    as_converted(folder, 3.0)
    with_scheduler(folder, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert load_pipeline(folder).scheduler.config.shift == 3.0


# ---- any scheduler is loaded as it was saved ----


def with_scheduler(folder, scheduler):
    """Put a scheduler of diffusers into a saved pipeline, as diffusers saves it."""
    edit_json(folder / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
SAVED = {
    "Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    "Euler, Karras": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0, use_karras_sigmas=True),
    "Euler, stochastic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=5.0),
    "LCM": lambda: diffusers.FlowMatchLCMScheduler(shift=5.0),
    "UniPC, order 3": lambda: diffusers.UniPCMultistepScheduler(**FLOW, solver_order=3),
    "UniPC, Karras": lambda: diffusers.UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True),
    "UniPC, thresholding": lambda: diffusers.UniPCMultistepScheduler(**FLOW, thresholding=True),
    "UniPC, sigma_min": lambda: diffusers.UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
    "DPM++": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, euler_at_final=True),
    "DPM++, SDE": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    "DEIS": lambda: diffusers.DEISMultistepScheduler(**FLOW),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_scheduler_of_diffusers(name, folder, tmp_path, pipe):
    scheduler = SAVED[name]()
    with_scheduler(folder, scheduler)
    loaded = load_pipeline(folder)
    plain = diffusers.WanPipeline.from_pretrained(folder).scheduler
    assert type(loaded.scheduler) is type(plain) is type(scheduler)
    assert dict(loaded.scheduler.config) == dict(plain.config)
    given = load_pipeline(folder, scheduler=scheduler)
    latents = latents_of(given)
    assert torch.equal(latents_of(loaded), latents)
    given.save_pretrained(tmp_path / "again")
    again = load_pipeline(tmp_path / "again")
    assert type(again.scheduler) is type(scheduler)
    assert torch.equal(latents_of(again), latents)
    if "stochastic" not in name:  # with its first level shifted once more, and other levels between
        assert not torch.equal(latents_of(pipe), latents)


def test_unipc_of_diffusers_in_a_folder_of_ours(tmp_path):
    """In a converted repository it stands for the official one; here somebody has chosen it."""
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    latents = latents_of(random_pipeline(scheduler=scheduler), flow_shift=None)
    random_pipeline(scheduler=scheduler).save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert type(again.scheduler) is diffusers.UniPCMultistepScheduler
    assert torch.equal(latents_of(again, flow_shift=None), latents)
    assert not torch.equal(latents_of(random_pipeline()), latents)


class HalfSteps(diffusers.FlowMatchEulerDiscreteScheduler):
    """A scheduler of somebody's own, which no library knows."""

    def step(self, model_output, *args, **kwargs):
        return super().step(model_output / 2, *args, **kwargs)


def test_a_scheduler_of_the_callers_own(folder, tmp_path):
    pipe = load_pipeline(folder, scheduler=HalfSteps(shift=5.0))
    latents = latents_of(pipe)
    pipe.save_pretrained(tmp_path / "own")
    again = load_pipeline(tmp_path / "own")
    assert type(again.scheduler) is HalfSteps
    assert torch.equal(latents_of(again), latents)
    plain = diffusers.WanPipeline.from_pretrained(tmp_path / "own").scheduler
    assert type(plain) is diffusers.FlowMatchEulerDiscreteScheduler  # diffusers loads none of others
    again.scheduler = plain
    again.save_pretrained(tmp_path / "plain")
    assert type(load_pipeline(tmp_path / "plain").scheduler) is type(plain)


def test_a_scheduler_of_a_class_that_is_not_here(folder, tmp_path, caplog):
    load_pipeline(folder, scheduler=HalfSteps(shift=5.0)).save_pretrained(tmp_path / "own")
    edit_json(tmp_path / "own/model_index.json", _wan22_scheduler=["elsewhere.steps", "HalfSteps"])
    loaded = load_pipeline(tmp_path / "own")
    assert type(loaded.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert "a HalfSteps of elsewhere.steps, which is not here" in caplog.text


class OwnUniPC(FlowMatchUniPCScheduler):
    """A solver of somebody's own that derives from ours."""


def test_a_scheduler_that_derives_from_ours(folder, tmp_path):
    load_pipeline(folder, scheduler=OwnUniPC(shift=5.0)).save_pretrained(tmp_path / "own")
    assert type(load_pipeline(tmp_path / "own").scheduler) is OwnUniPC
    plain = diffusers.WanPipeline.from_pretrained(tmp_path / "own").scheduler
    assert type(plain) is diffusers.UniPCMultistepScheduler and plain.config.flow_shift == 5.0


def test_a_diffusion_scheduler_is_refused(folder):
    scheduler = diffusers.UniPCMultistepScheduler(flow_shift=5.0)
    with_scheduler(folder, scheduler)
    with pytest.raises(ValueError, match="prediction_type='epsilon' must be \"flow_prediction\""):
        load_pipeline(folder)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler is not set to flow matching"):
        latents_of(load_pipeline(folder, scheduler=scheduler))


def test_an_image_to_video_repository(tmp_path):
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "ffn_dim": 32,
        "num_layers": 1,
        "text_dim": 32,
    }
    model = WanTransformer3DModel(in_channels=36, out_channels=16, **sizes)
    random_pipeline(experts=1).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "transformer")
    model.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"36 channels for 16.*image-to-video"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("entry", "refused"),
    [
        (
            ["diffusers", "AutoencoderKLWan"],
            r"diffusers\.AutoencoderKLWan.*none of diffusers' SchedulerMixin",
        ),
        (["os", "getcwd"], r"os\.getcwd.*none of diffusers' SchedulerMixin"),
        ("os", r"'os', not \[module, name\]"),
    ],
)
def test_what_is_no_scheduler_is_not_called(folder, tmp_path, entry, refused):
    load_pipeline(folder).save_pretrained(tmp_path / "own")
    edit_json(tmp_path / "own/model_index.json", _wan22_scheduler=entry)
    with pytest.raises(ValueError, match=refused):
        load_pipeline(tmp_path / "own")
