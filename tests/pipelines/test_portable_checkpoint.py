import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from mechdiffusers.models import ResponseEncoder, ResponsePredictor
from mechdiffusers.pipelines import LatentDDPMPipeline, portable_checkpoint
from mechdiffusers.pipelines.pipeline_latent_ddpm import record_training_schedule
from mechdiffusers.schedulers import PredictorCorrectorScheduler, ProbabilityFlowScheduler, VDMScheduler


def sample(pipe) -> torch.Tensor:
    return pipe(
        batch_size=3, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images


@pytest.fixture
def folder(pipe, tmp_path) -> Path:
    pipe.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_checkpoint_holds_code_weights_and_configurations_and_nothing_else(folder):
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "model_index.json",
        "pipeline_latent_ddpm.py",
        "portable_checkpoint.py",
        "response_encoder/config.json",
        "response_encoder/diffusion_pytorch_model.safetensors",
        "response_encoder/response_encoder.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_the_installed_class_loads_it_without_trusting_remote_code(pipe, folder):
    loaded = LatentDDPMPipeline.from_pretrained(folder)
    assert type(loaded) is LatentDDPMPipeline
    assert type(loaded.response_encoder) is ResponseEncoder
    assert torch.equal(sample(loaded), sample(pipe))
    assert loaded.scheduler.config.clip_sample is False


def test_what_the_decoder_means_comes_back(make_pipeline, tmp_path):
    make_pipeline(decoder_likelihood="discretized_logistic", decoder_scale=0.03).save_pretrained(tmp_path)
    loaded = LatentDDPMPipeline.from_pretrained(tmp_path)
    assert loaded.decoder_likelihood == "discretized_logistic"
    assert loaded.decoder_scale == 0.03


def test_a_scheduler_given_on_loading_takes_the_place_of_the_checkpoints(folder):
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    loaded = LatentDDPMPipeline.from_pretrained(folder, scheduler=scheduler)
    assert loaded.scheduler is scheduler
    assert sample(loaded).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "epsilon"}, "scheduler must have prediction_type='v_prediction', as the denoiser was"),
        ({"beta_schedule": "scaled_linear"}, "scheduler must have the noise schedule that the denoiser was trained"),
    ],
)
def test_a_scheduler_given_on_loading_that_does_not_suit_the_weights_is_refused(folder, change, message):
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", **change)
    with pytest.raises(ValueError, match=f"^{message}"):
        LatentDDPMPipeline.from_pretrained(folder, scheduler=scheduler)


def test_weights_load_in_another_dtype(folder):
    loaded = LatentDDPMPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert {module.dtype for module in (loaded.vae, loaded.unet, loaded.response_encoder)} == {torch.bfloat16}


@pytest.mark.slow
def test_plain_diffusers_loads_it_bit_identically_and_can_save_it_again(pipe, folder, tmp_path, plain_diffusers):
    torch.save(sample(pipe), tmp_path / "expected.pt")
    script = """
        import torch
        from diffusers import DiffusionPipeline

        expected = torch.load("expected.pt")
        for name in ("checkpoint", "again", "and_again"):
            pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, use_safetensors=True)
            generator = torch.Generator().manual_seed(0)
            images = pipe(batch_size=3, num_inference_steps=3, generator=generator, output_type="pt").images
            assert torch.equal(images, expected), name
            pipe.save_pretrained({"checkpoint": "again", "again": "and_again"}.get(name, "last"))
    """
    plain_diffusers(script)
    assert torch.equal(sample(LatentDDPMPipeline.from_pretrained(tmp_path / "last")), sample(pipe))


@pytest.mark.slow
def test_a_conditional_checkpoint_answers_in_plain_diffusers(make_pipeline, tmp_path, plain_diffusers):
    pipe = make_pipeline(conditional=True)
    pipe.save_pretrained(tmp_path / "checkpoint")
    response = torch.ones(2, 2, 3)
    images = pipe(response=response, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
    torch.save(images, tmp_path / "expected.pt")
    script = """
        import torch
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained("checkpoint", trust_remote_code=True, use_safetensors=True)
        generator = torch.manual_seed(0)
        images = pipe(response=torch.ones(2, 2, 3), num_inference_steps=2, generator=generator, output_type="pt").images
        assert torch.equal(images, torch.load("expected.pt"))
        assert pipe.response_encoder.config.spec["quantity"] == "stress"
    """
    plain_diffusers(script)


@pytest.mark.slow
def test_our_schedulers_travel_with_a_checkpoint(make_pipeline, tmp_path, plain_diffusers):
    pipe = make_pipeline()
    table = torch.linspace(9, -9, 50).tolist()
    for cls in (VDMScheduler, ProbabilityFlowScheduler, PredictorCorrectorScheduler):
        scheduler = cls.from_config(pipe.scheduler.config, log_snr=table)
        record_training_schedule(pipe.unet, scheduler)
        checkpoint = LatentDDPMPipeline(pipe.vae, pipe.unet, scheduler, pipe.response_encoder)
        checkpoint.set_progress_bar_config(disable=True)
        checkpoint.save_pretrained(tmp_path / cls.__name__)
        torch.save(sample(checkpoint), tmp_path / f"{cls.__name__}.pt")
    script = """
        import torch
        from diffusers import DiffusionPipeline

        for name in ("VDMScheduler", "ProbabilityFlowScheduler", "PredictorCorrectorScheduler"):
            for folder in (name, f"{name}-again"):
                pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, use_safetensors=True)
                assert type(pipe.scheduler).__name__ == name
                generator = torch.Generator().manual_seed(0)
                images = pipe(batch_size=3, num_inference_steps=3, generator=generator, output_type="pt").images
                assert torch.equal(images, torch.load(f"{name}.pt")), folder
                pipe.save_pretrained(f"{name}-again")
    """
    plain_diffusers(script)


def test_code_of_a_checkpoint_does_not_run_without_trust(folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)


def test_saving_over_a_checkpoint_keeps_files_of_other_names(pipe, folder):
    (folder / "README.md").write_text("a card")
    pipe.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "a card"
    assert not list(folder.parent.glob(".unfinished*"))


def test_a_save_that_fails_leaves_the_old_checkpoint_as_it_was(pipe, folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(pipe.response_encoder, "save_pretrained", fail)  # behind vae, unet and scheduler
    with pytest.raises(OSError, match="No space"):
        pipe.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_pickles_are_neither_written_nor_loaded(pipe, folder, tmp_path):
    with pytest.raises(ValueError, match=r"^safe_serialization must be True .* got False and False"):
        pipe.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="^use_safetensors must be True"):
        LatentDDPMPipeline.from_pretrained(folder, use_safetensors=False)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(pipe.unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match=r"safetensors"):
        LatentDDPMPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["vae", "unet", "response_encoder"])
def test_truncated_weights_are_named(folder, name):
    weights = folder / name / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{name}/diffusion_pytorch_model.safetensors is truncated or damaged"):
        LatentDDPMPipeline.from_pretrained(folder)


@pytest.mark.parametrize("content", ["[]", "{}", "3"])
@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json"])
def test_json_that_is_no_configuration_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is damaged: it must be a mapping with a _class_name"):
        LatentDDPMPipeline.from_pretrained(folder)


def test_no_configuration_tells_the_folder_that_a_part_came_from(folder, tmp_path):
    LatentDDPMPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


def test_garbage_for_weights_is_named(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(os.urandom(64))
    with pytest.raises(ValueError, match=r"vae/diffusion_pytorch_model.safetensors is truncated or damaged"):
        LatentDDPMPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "response_encoder/config.json"]
)
def test_a_damaged_configuration_is_named(folder, name):
    (folder / name).write_text((folder / name).read_text()[:-5])
    with pytest.raises(ValueError, match=f"{name} is damaged, not JSON"):
        LatentDDPMPipeline.from_pretrained(folder)


def test_a_folder_without_an_index_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no model_index.json"):
        LatentDDPMPipeline.from_pretrained(tmp_path)


def test_a_place_that_cannot_be_written_is_named(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^save_directory must be a folder that can be written, got .*file"):
        pipe.save_pretrained(tmp_path / "file")


def test_the_index_points_at_the_shipped_files(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_latent_ddpm", "LatentDDPMPipeline"]
    assert index["response_encoder"] == ["response_encoder", "ResponseEncoder"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_flashpack_is_refused_as_pickles_are(pipe, tmp_path):
    with pytest.raises(
        ValueError, match=r"^safe_serialization must be True and use_flashpack False: .* got True and T"
    ):
        pipe.save_pretrained(tmp_path / "new", use_flashpack=True)
    assert not (tmp_path / "new").exists()


def test_an_option_of_neither_the_save_nor_the_push_is_named(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"^push options must be among \['card', .* got \['max_shards'\]"):
        pipe.save_pretrained(tmp_path / "new", max_shards=3, push_to_hub=True)
    assert not (tmp_path / "new").exists()


def test_what_stock_diffusers_saved_is_read_and_loaded_by_the_installed_class(make_pipeline, tmp_path):
    pipe = make_pipeline(predictor=True, decoder_likelihood="discretized_logistic", decoder_scale=1e-3)
    DiffusionPipeline.save_pretrained(pipe, tmp_path)
    config = LatentDDPMPipeline.load_config(tmp_path)
    assert config["_class_name"] == "LatentDDPMPipeline"
    assert config["response_encoder"] == ["mechdiffusers.models.response_encoder", "ResponseEncoder"]
    loaded = LatentDDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.response_predictor) is ResponsePredictor
    assert torch.equal(sample(loaded), sample(pipe))


def test_an_installed_class_reads_installed_modules_in_the_place_of_shipped_files(make_pipeline, tmp_path):
    make_pipeline(predictor=True).save_pretrained(tmp_path)
    config, unused = LatentDDPMPipeline.load_config(tmp_path, return_unused_kwargs=True)
    assert config["_class_name"] == "LatentDDPMPipeline"
    assert config["response_predictor"] == ["mechdiffusers.models.response_predictor", "ResponsePredictor"]
    assert config["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert unused == {}


def test_from_pipe_takes_every_component_and_what_is_given_in_its_place(make_pipeline):
    pipe = make_pipeline(predictor=True)
    again = LatentDDPMPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert again.components == pipe.components
    assert torch.equal(sample(again), sample(pipe))
    ddim = DDIMScheduler.from_config(pipe.scheduler.config)
    other = LatentDDPMPipeline.from_pipe(pipe, scheduler=ddim, response_predictor=None)
    assert (other.scheduler, other.response_predictor, other.unet) == (ddim, None, pipe.unet)
    assert pipe.scheduler is not ddim


def test_the_configuration_of_a_part_of_transformers_needs_no_class_name(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text('{"hidden_size": 8}')
    assert portable_checkpoint._checked_index(folder) == index
