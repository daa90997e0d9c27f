"""What a user of diffusers expects of a call: sizes, grids of steps, latents, callbacks, batches."""

import math
import re

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from torch import Tensor

from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import ProbabilityFlowScheduler, VDMScheduler
from mechdiffusers.schedulers.variance_preserving_scheduler import NOISE_SCHEDULE

RESPONSE = torch.tensor([[[0.2, 4.0, 30.0]] * 2, [[3.0, 20.0, 90.0]] * 2, [[1.0, math.nan, 9.0]] * 2])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def take(pipe: LatentDDPMPipeline, cls: type, **options: object) -> LatentDDPMPipeline:
    config = pipe.scheduler.config
    schedule = {name: config[name] for name in NOISE_SCHEDULE if name in config}
    pipe.scheduler = cls.from_config({**schedule, "clip_sample": False}, **options)
    return pipe


def latents_of(pipe: LatentDDPMPipeline, **options: object) -> Tensor:
    options = {"num_inference_steps": 4, "generator": seeded(), **options}
    return pipe(output_type="latent", **options).images


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (9, 11), (24, 20)])
def test_images_of_another_size_are_drawn_without_a_response(pipe, size):
    height, width = size
    options = {"batch_size": 3, "num_inference_steps": 2}
    images = pipe(height=height, width=width, generator=seeded(), output_type="pt", **options).images
    assert images.shape == (3, 1, height, width)
    assert set(images.unique().tolist()) <= {0.0, 1.0}
    latents = pipe(height=height, width=width, generator=seeded(), output_type="latent", **options).images
    assert latents.shape == (3, 2, -(-height // 2), -(-width // 2))
    assert torch.equal(pipe.decode(latents)[..., :height, :width], images)


def test_a_size_that_is_that_of_the_checkpoint_changes_nothing(make_pipeline):
    pipe = make_pipeline(size=(7, 8), conditional=True)
    for options in ({"batch_size": 3}, {"response": RESPONSE}):
        expected = latents_of(pipe, **options)
        assert torch.equal(latents_of(pipe, height=7, width=8, **options), expected)
        assert torch.equal(latents_of(pipe, height=7, **options), expected)


def test_an_image_of_another_size_does_not_depend_on_how_many_follow(pipe):
    few, many = (latents_of(pipe, batch_size=num, height=12, width=16) for num in (1, 3))
    torch.testing.assert_close(few, many[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("option", "got"), [({"height": 16}, (16, 8)), ({"width": 6}, (8, 6))])
def test_a_response_belongs_to_designs_of_the_checkpoints_size(make_pipeline, option, got):
    message = rf"^height and width must be \(8, 8\) with a response, .* got \({got[0]}, {got[1]}\)"
    with pytest.raises(ValueError, match=message):
        make_pipeline(conditional=True)(response=RESPONSE, **option)


@pytest.mark.parametrize(("option", "value"), [("height", 0), ("width", 8.0), ("height", "8"), ("width", True)])
def test_a_size_that_is_none_is_named(pipe, option, value):
    with pytest.raises(ValueError, match=f"^{option} must be an integer of at least 1, got {value!r}"):
        pipe(**{option: value})


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        (DDPMScheduler, "timesteps"),
        (HeunDiscreteScheduler, "timesteps"),
        (VDMScheduler, "timesteps"),
        (DPMSolverMultistepScheduler, "timesteps"),
        (EulerDiscreteScheduler, "timesteps"),
        (EulerDiscreteScheduler, "sigmas"),
    ],
)
def test_a_grid_of_steps_that_is_given_is_that_of_the_call(pipe, cls, option):
    take(pipe, cls)
    seen = []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda sample, t, *args, **kwargs: (seen.append(float(t)), forward(sample, t, *args, **kwargs))[
        1
    ]
    timesteps = [900, 500, 200, 100]
    alphas_cumprod = pipe.scheduler.alphas_cumprod[timesteps]
    values = timesteps if option == "timesteps" else [*((1 - alphas_cumprod) / alphas_cumprod).sqrt().tolist(), 0.0]
    latents = latents_of(pipe, num_inference_steps=50, **{option: values})
    assert sorted({round(t) for t in seen}, reverse=True) == timesteps
    assert pipe.num_timesteps == len(seen)
    assert latents.isfinite().all()


def test_timesteps_that_are_those_of_a_number_of_steps_change_nothing(pipe):
    expected = latents_of(pipe)
    assert torch.equal(latents_of(pipe, num_inference_steps=50, timesteps=[750, 500, 250, 0]), expected)


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        (DDIMScheduler, {"timesteps": [900, 100]}),
        (DDIMScheduler, {"sigmas": [1.0, 0.1]}),
        (DDPMScheduler, {"sigmas": [1.0, 0.1]}),
        (VDMScheduler, {"sigmas": [1.0, 0.1]}),
        (PNDMScheduler, {"timesteps": [900, 100]}),
    ],
)
def test_a_grid_of_steps_that_the_scheduler_does_not_take_is_named(pipe, cls, option):
    ((name, value),) = option.items()
    message = rf"^{name} must be None for {cls.__name__}, which takes none, got \[{value[0]}, {value[1]}\]"
    with pytest.raises(ValueError, match=message):
        take(pipe, cls)(**option)


@pytest.mark.parametrize("values", [[], [100, 900], [900, 900], [900, -5], [1500, 100], [math.nan], "abc", 5, [[9, 1]]])
@pytest.mark.parametrize("cls", [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, VDMScheduler])
def test_timesteps_that_are_no_grid_are_named(pipe, cls, values):
    message = rf"^timesteps must fall strictly and lie in \[0, 1000\), got {re.escape(repr(values))}"
    with pytest.raises(ValueError, match=message):
        take(pipe, cls)(timesteps=values)


@pytest.mark.parametrize("values", [[], [0.1, 1.0], [1.0, -0.1], [math.inf, 1.0], [math.nan], "abc"])
def test_sigmas_that_are_no_grid_are_named(pipe, values):
    message = rf"^sigmas must fall strictly and lie in \[0, inf\), got {re.escape(repr(values))}"
    with pytest.raises(ValueError, match=message):
        take(pipe, EulerDiscreteScheduler)(sigmas=values)


@pytest.mark.parametrize("timesteps", [(900, 100), torch.tensor([900, 100]), np.array([900, 100])])
def test_timesteps_may_stand_in_any_sequence(pipe, timesteps):
    expected = latents_of(pipe, timesteps=[900, 100])
    assert torch.equal(latents_of(pipe, timesteps=timesteps), expected)


def test_timesteps_and_sigmas_are_not_both_given(pipe):
    with pytest.raises(ValueError, match=r"^timesteps or sigmas must be given, not both, got \[900\] and \[1.0\]"):
        take(pipe, EulerDiscreteScheduler)(timesteps=[900], sigmas=[1.0])


def test_eta_is_the_share_of_noise_of_ddims_steps(pipe):
    take(pipe, DDIMScheduler)
    start = torch.randn(2, 2, 4, 4, generator=seeded(1))
    without, half, other_half, full = (
        latents_of(pipe, batch_size=2, latents=start, generator=seeded(seed), **options)
        for seed, options in ((0, {}), (0, {"eta": 0.5}), (1, {"eta": 0.5}), (0, {"eta": 1.0}))
    )
    assert torch.equal(latents_of(pipe, batch_size=2, latents=start, generator=seeded(1)), without)
    assert not torch.equal(half, other_half)
    assert not torch.equal(half, full)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # DDIM with eta 1 is its ancestral step
    torch.testing.assert_close(latents_of(pipe, batch_size=2, latents=start), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [DDPMScheduler, DPMSolverMultistepScheduler, ProbabilityFlowScheduler])
def test_eta_is_refused_where_steps_take_none(pipe, cls):
    take(pipe, cls)
    with pytest.raises(ValueError, match=f"^eta must be 0 for {cls.__name__}, whose step takes none, got 0.5"):
        pipe(eta=0.5)


@pytest.mark.parametrize(
    ("eta", "message"),
    [(2.0, r"eta must lie in \[0, 1\], got 2.0"), (-0.1, r"eta must lie in \[0, 1\]"), ("1", "eta must be a number")],
)
def test_an_eta_that_is_no_share_is_named(pipe, eta, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        take(pipe, DDIMScheduler)(eta=eta)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 3}, {"response": RESPONSE, "num_candidates": 2, "num_refinements": 1}],
    ids=["free", "refined"],
)
def test_latents_decode_to_the_images_of_the_same_call(make_pipeline, options):
    pipe = make_pipeline(predictor=True)
    latents = latents_of(pipe, **options)
    assert latents.shape == (3, 2, 4, 4)
    images = pipe(num_inference_steps=4, generator=seeded(), output_type="pt", **options).images
    assert torch.equal(pipe.decode(latents), images)
    (as_tuple,) = pipe(num_inference_steps=4, generator=seeded(), output_type="latent", return_dict=False, **options)
    assert torch.equal(as_tuple, latents)


@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize(("cutoff", "num_guided"), [({"cutoff_step_index": 2}, 3), ({"cutoff_step_ratio": 0.25}, 3)])
def test_the_stock_cutoff_of_guidance_is_guidance_stop_to_the_bit(make_pipeline, num_images, cutoff, num_guided):
    """It acts behind its step, so that the step itself is guided."""
    pipe = make_pipeline(conditional=True)
    options = {"response": RESPONSE[:num_images], "guidance_scale": 3.0, "num_inference_steps": 8}
    stopped = latents_of(pipe, guidance_stop=num_guided / 8, **options)
    ratio = {"cutoff_step_ratio": None, "cutoff_step_index": None, **cutoff}
    cut = latents_of(pipe, callback_on_step_end=SDCFGCutoffCallback(**ratio), **options)
    assert torch.equal(cut, stopped)
    assert not torch.equal(cut, latents_of(pipe, **options))
    several = MultiPipelineCallbacks([SDCFGCutoffCallback(**ratio)])
    assert torch.equal(latents_of(pipe, callback_on_step_end=several, **options), stopped)


def test_the_stock_cutoff_halves_what_the_denoiser_sees_and_the_next_call_is_guided_again(make_pipeline):
    pipe = make_pipeline(conditional=True)
    sizes, forward = [], pipe.unet.forward
    pipe.unet.forward = lambda sample, *args, **kwargs: (sizes.append(len(sample)), forward(sample, *args, **kwargs))[1]
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    for callback in (cutoff, None):
        latents_of(pipe, response=RESPONSE, guidance_scale=3.0, callback_on_step_end=callback)
    assert sizes == [6, 6, 3, 3, *[6] * 4]
    assert pipe.guidance_scale == 3.0


def test_a_callback_is_given_the_tensors_that_it_asks_for(make_pipeline):
    pipe, seen = make_pipeline(conditional=True), []

    def callback(pipe, step, timestep, tensors):
        seen.append({name: tensor.shape for name, tensor in tensors.items()})
        return {}

    options = {"response": RESPONSE, "callback_on_step_end": callback}
    latents, embeds = (3, 2, 4, 4), (3, 2, 6)
    for asked, scale, expected in (
        (["latents"], 1.0, {"latents": latents}),
        ([], 1.0, {}),
        (["latents", "prompt_embeds"], 1.0, {"latents": latents, "prompt_embeds": embeds}),
        (["prompt_embeds"], 2.0, {"prompt_embeds": (6, 2, 6)}),
    ):
        latents_of(pipe, guidance_scale=scale, callback_on_step_end_tensor_inputs=asked, **options)
        assert seen == [expected] * 4
        seen.clear()
    with pytest.raises(ValueError, match=r"^callback_on_step_end_tensor_inputs must be among .* got \['noise'\]"):
        pipe(callback_on_step_end_tensor_inputs=["latents", "noise"], **options)


def test_tokens_that_a_callback_returns_are_attended_to_from_the_next_step_on(make_pipeline):
    pipe, seen = make_pipeline(conditional=True), []
    forward = pipe.unet.forward

    def watch(sample: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> object:
        seen.append(encoder_hidden_states)
        return forward(sample, t, encoder_hidden_states=encoder_hidden_states)

    def double(pipe, step, timestep, tensors):
        return {"prompt_embeds": 2 * tensors["prompt_embeds"]} if step == 1 else {}

    pipe.unet.forward = watch
    inputs = {"callback_on_step_end": double, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    changed = latents_of(pipe, response=RESPONSE, **inputs)
    tokens = pipe.response_encoder(RESPONSE)
    for found, factor in zip(seen, (1, 1, 2, 2), strict=True):
        assert torch.equal(found, factor * tokens)
    assert not torch.equal(changed, latents_of(pipe, response=RESPONSE))


def test_a_call_that_is_interrupted_ends_behind_that_step_and_the_next_one_runs(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        pipe._interrupt = step == 1
        assert pipe.interrupt == (step == 1)
        return tensors

    latents = latents_of(pipe, callback_on_step_end=callback)
    assert len(seen) == 2
    assert torch.equal(latents, seen[-1])
    latents_of(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(None) or tensors)
    assert len(seen) == 2 + 4


@pytest.mark.parametrize("last", [1, 20])
def test_an_interrupted_call_is_not_refined_further(make_pipeline, monkeypatch, last):
    """Neither the samples nor the variants of a refinement are finished then."""
    pipe, seen = make_pipeline(predictor=True), []

    def the_last_is_best(found, wanted):
        return -torch.arange(found.shape[1]).expand(found.shape[:2])

    monkeypatch.setattr(pipe.response_predictor, "response_error", the_last_is_best)

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = len(seen) > last
        return {}

    options = {"response": RESPONSE, "num_refinements": 2, "num_inference_steps": 20}
    latents = latents_of(pipe, callback_on_step_end=callback, **options)
    assert len(seen) == last + 1
    assert torch.equal(latents, seen[min(last, 19)])


@pytest.mark.parametrize(("cls", "num"), [(DDPMScheduler, 4), (HeunDiscreteScheduler, 7)])
def test_num_timesteps_counts_the_evaluations_of_the_scheduler(pipe, cls, num):
    take(pipe, cls)
    seen = []
    latents_of(pipe, callback_on_step_end=lambda pipe, step, t, tensors: seen.append(pipe.num_timesteps) or tensors)
    assert seen == [num] * num


def test_however_many_images_are_drawn_few_are_decoded_and_encoded_at_once(pipe, monkeypatch):
    expected = pipe(batch_size=5, num_inference_steps=2, generator=seeded(), output_type="pt").images
    latents = pipe.encode(expected)
    sizes, decode, encode = [], pipe.vae.decode, pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "decode", lambda codes: sizes.append(len(codes)) or decode(codes))
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr("mechdiffusers.pipelines.pipeline_latent_ddpm._BATCH", 2)
    images = pipe(batch_size=5, num_inference_steps=2, generator=seeded(), output_type="pt").images
    assert torch.equal(images, expected)
    torch.testing.assert_close(pipe.encode(images), latents)
    draw = pipe.encode(images, sample_posterior=True, generator=[seeded(i) for i in range(5)])
    alone = pipe.encode(images[4:], sample_posterior=True, generator=[seeded(4)])
    torch.testing.assert_close(draw[4:], alone)
    assert sizes == [2, 2, 1, *[2, 2, 1] * 2, 1]


def test_sigmas_end_without_noise_whether_the_zero_is_given_or_not(pipe):
    take(pipe, EulerDiscreteScheduler)
    expected = latents_of(pipe, sigmas=[100.0, 20.0, 5.0, 1.0, 0.0])
    assert torch.equal(latents_of(pipe, sigmas=[100.0, 20.0, 5.0, 1.0]), expected)
    assert pipe.num_timesteps == 4


@pytest.mark.parametrize("cls", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_fractional_timesteps_are_refused_where_they_would_be_cut_off(pipe, cls):
    with pytest.raises(ValueError, match=f"^timesteps must be integers for {cls.__name__}, which cuts off fractions"):
        take(pipe, cls)(timesteps=[900.5, 100.0])


def test_a_cut_off_of_guidance_holds_for_the_refinements(make_pipeline):
    pipe, seen = make_pipeline(predictor=True), []
    take(pipe, DDIMScheduler)
    pipe.unet.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    options = {"response": RESPONSE[:1], "guidance_scale": 3.0, "predictor_guidance_scale": 0.0, "num_refinements": 1}
    pipe(num_inference_steps=10, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.4), **options)
    assert seen[:5] == [2] * 5
    assert set(seen[5:]) == {1}
    assert len(seen) > 10


def test_latents_that_are_asked_for_are_not_decoded(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.vae), "decode", None)
    assert latents_of(pipe).isfinite().all()


@pytest.mark.parametrize("latents", [np.full((1, 2, 4, 4), np.nan), torch.full((1, 2, 4, 4), math.inf)])
def test_latents_that_are_not_finite_are_not_decoded(pipe, latents):
    with pytest.raises(ValueError, match="^latents must be finite"):
        pipe.decode(latents)


def test_a_callback_that_is_no_function_is_refused(pipe):
    with pytest.raises(ValueError, match="^callback_on_step_end must be a function or None, got 3"):
        pipe(callback_on_step_end=3)
