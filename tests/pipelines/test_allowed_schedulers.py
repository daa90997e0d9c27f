"""Which schedulers a pipeline takes: those that sample the diffusion that its denoiser was trained for."""

import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

import mechdiffusers.schedulers
from mechdiffusers.pipelines import LatentDDPMPipeline, pipeline_latent_ddpm
from mechdiffusers.schedulers import VDMScheduler
from mechdiffusers.schedulers.log_snr_curve import LogSnrCurve
from mechdiffusers.schedulers.variance_preserving_scheduler import NOISE_SCHEDULE

ALLOWED = pipeline_latent_ddpm._SCHEDULERS
#: Of the two channels of latents whose pixels are independent.
MEAN, STD = (torch.tensor(values, dtype=torch.float64).view(2, 1, 1) for values in ((0.5, -0.4), (0.7, 1.2)))
REFUSED = {
    "ddim inverse": (DDIMInverseScheduler, {"clip_sample": False}),
    "dpmsolver inverse": (DPMSolverMultistepInverseScheduler, {}),
    "euler continuous": (EulerDiscreteScheduler, {"timestep_type": "continuous"}),
    "euler log-linear": (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}),
    "lcm": (LCMScheduler, {"clip_sample": False}),
    "ddim clipped": (DDIMScheduler, {"clip_sample": True}),
    "ddpm learned": (DDPMScheduler, {"clip_sample": False, "variance_type": "learned_range"}),
    "dpmsolver cut": (DPMSolverMultistepScheduler, {"lambda_min_clipped": 0.0}),
    "euler between": (EulerDiscreteScheduler, {"sigma_max": 3.0, "sigma_min": 1.0, "use_karras_sigmas": True}),
    "dpmsolver flow": (DPMSolverMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}


def make(cls: type, pipe: LatentDDPMPipeline, **options: object) -> diffusers.SchedulerMixin:
    config = pipe.scheduler.config
    schedule = {name: config[name] for name in NOISE_SCHEDULE if name in config}
    return cls.from_config({**schedule, "clip_sample": False}, **options)


def class_of(name: str) -> type:
    return getattr(mechdiffusers.schedulers, name, None) or getattr(diffusers, name)


def with_an_exact_denoiser(pipe: LatentDDPMPipeline, prediction_type: str = "v_prediction") -> LatentDDPMPipeline:
    """A pipeline whose denoiser is that of Gaussian latents, by Bayes' rule."""
    curve = LogSnrCurve.of_scheduler(pipe.scheduler)

    def forward(x: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor) -> SimpleNamespace:
        log_snr = float(curve.at(float(t)))
        alpha, sigma = math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))
        noise = sigma * (x.double() - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        clean = (x.double() - sigma * noise) / alpha
        outputs = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}
        return SimpleNamespace(sample=outputs[prediction_type].float())

    pipe.unet.forward = forward
    return pipe


def moments(pipe: LatentDDPMPipeline, num_inference_steps: int = 25, **options: object) -> torch.Tensor:
    """Error of the mean, and of the standard deviation, of each channel, in standard deviations of it."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": num_inference_steps, "output_type": "latent", **options}
    latents = pipe(batch_size=2, generator=generator, **options).images.double().transpose(0, 1).flatten(1)
    return torch.stack([latents.mean(1) - MEAN.flatten(), latents.std(1) - STD.flatten()]) / STD.flatten()


@pytest.mark.parametrize(("num_inference_steps", "bias"), [(25, 0.15), (250, 0.03)])
@pytest.mark.parametrize("name", ALLOWED)
def test_samples_of_an_exact_gaussian_denoiser_have_the_gaussians_moments(
    make_pipeline, name, num_inference_steps, bias
):
    """With 8192 pixels a channel, their error by chance is below 0.05 in a mean and 0.035 in a standard deviation."""
    pipe = with_an_exact_denoiser(make_pipeline(size=128, timestep_spacing="trailing"))
    pipe.scheduler = make(class_of(name), pipe)
    mean, std = moments(pipe, num_inference_steps).abs()
    assert mean.max() < 0.05
    assert std.max() < bias + 0.035


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
@pytest.mark.parametrize("name", ALLOWED)
def test_so_they_have_whatever_the_denoiser_predicts(make_pipeline, name, prediction_type):
    pipe = make_pipeline(size=128, timestep_spacing="trailing", prediction_type=prediction_type)
    with_an_exact_denoiser(pipe, prediction_type)
    try:
        pipe.scheduler = make(class_of(name), pipe)
        mean, std = moments(pipe).abs()
    except (NotImplementedError, ValueError):
        assert prediction_type == "sample"
        assert name[:4] in ("KDPM", "PNDM") or name == "EulerAncestralDiscreteScheduler"
        return
    assert mean.max() < 0.05
    assert std.max() < 0.15 + 0.035


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"ddpm learned"}))  # which asks the denoiser for a variance
def test_what_is_refused_misses_them(make_pipeline, name, monkeypatch):
    cls, options = REFUSED[name]
    pipe = with_an_exact_denoiser(make_pipeline(size=128, timestep_spacing="trailing"))
    monkeypatch.setattr(pipeline_latent_ddpm, "_check_kind_of_scheduler", lambda scheduler: None)
    monkeypatch.setattr(pipe, "check_scheduler", lambda: None)
    pipe.scheduler = make(cls, pipe, **options)
    mean, std = moments(pipe).abs()
    assert mean.max() > 0.1 or std.max() > 0.25


@pytest.mark.parametrize("name", REFUSED)
def test_a_scheduler_of_another_kind_is_refused_by_name_in_a_call_and_in_the_constructor(pipe, name):
    cls, options = REFUSED[name]
    parts = {**pipe.components, "scheduler": make(cls, pipe, **options)}
    if cls.__name__ in ALLOWED:
        got = "|".join(f"{option}={value!r}" for option, value in options.items())
        message = f"^scheduler must neither clip .* got {cls.__name__} with ({got}); make it by"
    else:
        message = f"^scheduler must be one of {', '.join(ALLOWED)}, got {cls.__name__}$"
    with pytest.raises(ValueError, match=message):
        LatentDDPMPipeline(**parts)
    pipe.scheduler = parts["scheduler"]
    with pytest.raises(ValueError, match=message):
        pipe(num_inference_steps=2)


class OwnDDIM(DDIMScheduler):
    """A scheduler of a user, derived from one that is allowed."""


def test_a_scheduler_derived_from_an_allowed_one_is_allowed(pipe):
    pipe.scheduler = make(DDIMScheduler, pipe)
    images = pipe(num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
    pipe.scheduler = make(OwnDDIM, pipe)
    assert torch.equal(pipe(num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images, images)


@pytest.mark.parametrize("skip_prk_steps", [False, True])
def test_runge_kutta_steps_are_not_refined(make_pipeline, skip_prk_steps):
    pipe = make_pipeline(predictor=True)
    pipe.scheduler = make(PNDMScheduler, pipe, skip_prk_steps=skip_prk_steps)
    call = {"response": torch.ones(1, 2, 3), "num_inference_steps": 8, "num_refinements": 1, "output_type": "pt"}
    if skip_prk_steps:
        assert pipe(**call).images.shape == (1, 1, 8, 8)
        return
    with pytest.raises(ValueError, match="^num_refinements must be 0 with .* Runge-Kutta .* got 1 with PNDMScheduler"):
        pipe(**call)


def test_a_solver_that_needs_the_steps_before_is_not_refined(make_pipeline):
    pipe = make_pipeline(predictor=True)
    pipe.scheduler = make(LMSDiscreteScheduler, pipe)
    with pytest.raises(ValueError, match="^num_refinements must be 0 with LMSDiscreteScheduler .* got 1 with LMS"):
        pipe(response=torch.ones(1, 2, 3), num_inference_steps=8, num_refinements=1)


def test_options_of_other_classes_in_a_configuration_are_no_reason_to_refuse(pipe):
    clipping = DDPMScheduler.from_config({**pipe.scheduler.config, "clip_sample": True})
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(clipping.config)
    assert pipe.scheduler.config.clip_sample
    pipe(num_inference_steps=2)


#: Schedulers of an allowed kind that the denoiser was not trained for.
OTHERS = [
    (DDIMScheduler, {"prediction_type": "epsilon"}),
    (VDMScheduler, {"log_snr": "linear"}),
    (DDIMScheduler, {"beta_schedule": "scaled_linear"}),
    (DDIMScheduler, {"num_train_timesteps": 500}),
]


@pytest.mark.parametrize(("cls", "options"), OTHERS)
def test_a_refusal_survives_saving_loading_and_being_made_of_components(pipe, tmp_path, cls, options):
    wrong = make(cls, pipe, **options)
    pipe.save_pretrained(tmp_path / "first")
    LatentDDPMPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    loaded = LatentDDPMPipeline.from_pretrained(tmp_path / "second")
    again = LatentDDPMPipeline(**loaded.components)
    for one in (pipe, loaded, again, LatentDDPMPipeline.from_pipe(again)):
        right, one.scheduler = one.scheduler, wrong
        with pytest.raises(ValueError, match="^scheduler must have "):
            one(num_inference_steps=2)
        with pytest.raises(ValueError, match="^scheduler must have "):
            LatentDDPMPipeline(**one.components)
        with pytest.raises(ValueError, match="^scheduler must have "):
            LatentDDPMPipeline.from_pipe(one)
        one.scheduler = right
    with pytest.raises(ValueError, match="^scheduler must have "):
        LatentDDPMPipeline.from_pretrained(tmp_path / "second", scheduler=wrong)
    pipe.scheduler = wrong  # saved in spite of it, it is no pipeline either
    pipe.save_pretrained(tmp_path / "third")
    with pytest.raises(ValueError, match="^scheduler must have "):
        LatentDDPMPipeline.from_pretrained(tmp_path / "third")
