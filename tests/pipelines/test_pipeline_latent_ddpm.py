import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
)
from PIL import Image

from mechdiffusers.likelihood import LatentDiffusion
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.schedulers import STOCK_SCHEDULERS, VDMScheduler, stock_scheduler


def generators(num: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(num)]


def noise(num: int) -> torch.Tensor:
    return torch.randn(num, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def grey_pipe(make_pipeline):
    """A pipeline whose images are grey."""
    return make_pipeline(decoder_likelihood="discretized_logistic", decoder_scale=1e-3)


def latents_of(pipe, **arguments) -> torch.Tensor:
    """The latents that a call ends with."""
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    pipe(callback_on_step_end=keep, output_type="pt", num_inference_steps=4, **arguments)
    return seen[-1]


def test_output_types_hold_the_same_images(pipe):
    tensor, array, pictures = (
        pipe(batch_size=3, num_inference_steps=2, generator=torch.manual_seed(0), output_type=kind).images
        for kind in ("pt", "np", "pil")
    )
    assert tensor.shape == (3, 1, 8, 8)
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert [picture.mode for picture in pictures] == ["L"] * 3
    np.testing.assert_array_equal(np.stack([np.asarray(picture) / 255 for picture in pictures]), array[..., 0])
    (as_tuple,) = pipe(
        batch_size=3, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt", return_dict=False
    )
    assert torch.equal(as_tuple, tensor)


def test_a_bernoulli_decoder_gives_binary_designs(pipe):
    images = pipe(batch_size=8, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
    assert set(images.unique().tolist()) <= {0.0, 1.0}


def test_a_discretised_logistic_decoder_gives_grey_levels(grey_pipe):
    images = grey_pipe(batch_size=8, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
    levels = images.double() * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert len(images.unique()) > 2


@pytest.mark.parametrize("scheduler", STOCK_SCHEDULERS)
def test_an_image_depends_on_its_own_generator_alone(pipe, scheduler):
    pipe.scheduler = stock_scheduler(scheduler, pipe.scheduler.config)
    together = latents_of(pipe, batch_size=3, generator=generators(3))
    alone = torch.cat([latents_of(pipe, batch_size=1, generator=[g]) for g in generators(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_single_generator_gives_the_same_first_images_in_a_larger_batch(pipe):
    few = latents_of(pipe, batch_size=2, generator=torch.Generator().manual_seed(5))
    many = latents_of(pipe, batch_size=7, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(few, many[:2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(many[0], many[1])


def test_latents_to_start_from_are_used(pipe):
    pipe.scheduler = stock_scheduler("ddim", pipe.scheduler.config)  # deterministic behind its start
    first, second = (latents_of(pipe, batch_size=2, latents=noise(2)) for _ in range(2))
    assert torch.equal(first, second)


def test_the_callback_sees_every_step_and_may_change_the_latents(pipe):
    seen = []

    def blank(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipe(num_inference_steps=3, output_type="pt", callback_on_step_end=blank).images
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [t for _, t in seen] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(images, pipe.decode(torch.zeros(1, 2, 4, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_runs_in_other_dtypes(pipe, dtype):
    pipe = pipe.to(dtype)
    assert latents_of(pipe, batch_size=2).dtype == dtype
    assert pipe(num_inference_steps=2, output_type="np").images.dtype in (np.float32, np.float64)


def test_encoding_inverts_scale_and_shift_of_decoding(pipe):
    images = torch.rand(3, 1, 8, 8).round()
    codes = pipe.vae.encode(2 * images - 1).latent_dist.mean
    latents = pipe.encode(images)
    torch.testing.assert_close(latents, (codes - 0.2) * 0.7)
    expected = (pipe.vae.decode(codes).sample > 0).float()
    torch.testing.assert_close(pipe.decode(latents), expected)


def test_a_draw_from_the_posterior_has_its_moments(pipe):
    image = torch.rand(1, 1, 8, 8).round()
    posterior = pipe.vae.encode(2 * image - 1).latent_dist
    draws = pipe.encode(image.expand(4000, 1, 8, 8), sample_posterior=True, generator=torch.manual_seed(0))
    standard_error = 0.7 * posterior.std / math.sqrt(4000)
    assert ((draws.mean(0) - (posterior.mean[0] - 0.2) * 0.7).abs() < 5 * standard_error[0]).all()
    torch.testing.assert_close(draws.std(0), 0.7 * posterior.std[0], rtol=0.08, atol=0)


def test_every_kind_of_image_is_understood(pipe):
    tensor = torch.rand(2, 1, 8, 8).round()
    kinds = [
        tensor,
        tensor[:, 0],
        tensor.permute(0, 2, 3, 1).numpy(),
        tensor[:, 0].numpy(),
        [Image.fromarray((image[0] * 255).byte().numpy()) for image in tensor],
    ]
    expected = pipe.encode(tensor)
    for kind in kinds:
        torch.testing.assert_close(pipe.encode(kind), expected)


@pytest.mark.parametrize("size", [(7, 8), (9, 11), (8, 6)])
def test_sizes_that_the_factor_does_not_divide_are_padded_and_cropped(make_pipeline, size):
    pipe = make_pipeline(size=size)
    latents = pipe.encode(torch.zeros(2, *size))
    assert latents.shape == (2, 2, math.ceil(size[0] / 2), math.ceil(size[1] / 2))
    assert pipe.decode(latents).shape == (2, 1, *size)
    assert pipe(num_inference_steps=1, output_type="pt").images.shape == (1, 1, *size)


def test_interpolation_starts_and_ends_at_its_ends(pipe):
    a, b = torch.rand(2, 1, 8, 8).round().split(1)
    path = pipe.interpolate(a, b, num=5, output_type="pt")
    assert path.shape == (5, 1, 8, 8)
    assert torch.equal(path[:1], pipe.decode(pipe.encode(a)))
    assert torch.equal(path[-1:], pipe.decode(pipe.encode(b)))
    between = LatentDiffusion(pipe).interpolate(pipe.encode(a), pipe.encode(b), num=5)
    assert torch.equal(path, pipe.decode(between.float()))
    pictures = pipe.interpolate(a, b, num=5)
    np.testing.assert_array_equal(np.stack([np.asarray(picture) / 255 for picture in pictures]), path[:, 0].numpy())


def test_guidance_is_the_weighted_sum_of_the_two_predictions(make_pipeline):
    pipe = make_pipeline(conditional=True)
    pipe.scheduler = stock_scheduler("ddim", pipe.scheduler.config)
    response = 3 * torch.rand(2, 2, 3)
    conditional, unconditional, guided = (
        _first_prediction(pipe, latents=noise(2), response=response, guidance_scale=scale) for scale in (1, 0, 2.5)
    )
    torch.testing.assert_close(guided, unconditional + 2.5 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    free = _first_prediction(pipe, latents=noise(2), batch_size=2)
    torch.testing.assert_close(unconditional, free, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(conditional, unconditional)


def test_rescaled_guidance_has_the_spread_of_the_conditional_prediction(make_pipeline):
    pipe = make_pipeline(conditional=True)
    arguments = {"latents": noise(2), "response": 3 * torch.rand(2, 2, 3)}
    conditional = _first_prediction(pipe, **arguments)
    guided, rescaled, half = (
        _first_prediction(pipe, guidance_scale=4.0, guidance_rescale=rescale, **arguments) for rescale in (0, 1, 0.5)
    )
    torch.testing.assert_close(rescaled.flatten(1).std(1), conditional.flatten(1).std(1))
    torch.testing.assert_close(half, (guided + rescaled) / 2)


def test_guidance_acts_between_its_start_and_its_stop_alone(make_pipeline):
    pipe = make_pipeline(conditional=True)
    sizes = []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda sample, *args, **kwargs: (sizes.append(len(sample)), forward(sample, *args, **kwargs))[1]
    interval = {"guidance_start": 0.2, "guidance_stop": 0.5}
    pipe(response=torch.ones(3, 2, 3), num_inference_steps=10, guidance_scale=2.0, output_type="pt", **interval)
    assert sizes == [3, 3, 6, 6, 6, 3, 3, 3, 3, 3]


def _first_prediction(pipe, **arguments) -> torch.Tensor:
    """What the scheduler is given at the first step."""
    seen = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda prediction, *args, **kwargs: (
        seen.append(prediction),
        step(prediction, *args, **kwargs),
    )[1]
    pipe(num_inference_steps=2, output_type="pt", **arguments)
    del pipe.scheduler.step
    return seen[0]


def test_images_of_one_response_are_neighbours(make_pipeline):
    pipe = make_pipeline(conditional=True)
    response = 3 * torch.rand(2, 2, 3)
    four = latents_of(pipe, response=response, num_images_per_response=2, generator=generators(4))
    repeated = latents_of(pipe, response=response.repeat_interleave(2, 0), generator=generators(4))
    torch.testing.assert_close(four, repeated)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"num_inference_steps": 1.5}, "num_inference_steps must"),
        ({"num_inference_steps": 10**6}, "num_inference_steps must be at most the [0-9]+ of training, got 1000000"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a non-negative number, got -1.0"),
        ({"guidance_scale": math.nan}, "guidance_scale must"),
        ({"guidance_scale": "2"}, "guidance_scale must be a number, got '2'"),
        ({"guidance_stop": None}, "guidance_stop must be a number, got None"),
        ({"predictor_guidance_scale": [4.0]}, r"predictor_guidance_scale must be a number, got \[4.0\]"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must lie in \[0, 1\], got 1.5"),
        ({"guidance_start": 0.6, "guidance_stop": 0.5}, "guidance_start must be at most guidance_stop=0.5, got 0.6"),
        ({"guidance_stop": 1.1}, r"guidance_stop must lie in \[0, 1\], got 1.1"),
        ({"output_type": "jpg"}, r"output_type must be one of \('pil', 'np', 'pt', 'latent'\), got 'jpg'"),
        (
            {"generator": [torch.Generator()] * 2},
            r"generator must be one or a list of 1, .* got \['Generator', 'Generator'\]",
        ),
        ({"generator": 3}, "generator must be one or a list of 1, one an image, got 3"),
        ({"generator": [3]}, r"generator must be one or a list of 1, one an image, got \['int'\]"),
        ({"latents": torch.zeros(1, 2, 3, 3)}, r"latents must be a tensor of shape \(1, 2, 4, 4\), got \(1, 2, 3, 3\)"),
        ({"latents": torch.full((1, 2, 4, 4), math.nan)}, "latents must be finite, got NaN"),
        ({"latents": np.zeros((1, 2, 4, 4))}, r"latents must be a tensor of shape \(1, 2, 4, 4\), got ndarray"),
        ({"response": np.zeros((1, 2, 3))}, "response must be None: this checkpoint was trained without responses"),
    ],
)
def test_bad_arguments_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        pipe(**arguments)


def test_a_grid_in_the_log_snr_may_have_more_steps_than_training(pipe):
    class Begun(Exception):
        pass

    def stop(pipe, step, timestep, state):
        raise Begun

    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, timestep_spacing="log_snr")
    with pytest.raises(Begun):
        pipe(num_inference_steps=len(pipe.scheduler.alphas_cumprod) + 1, callback_on_step_end=stop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"response": torch.zeros(2, 3)}, r"response must have shape \(B, 2, 3\): the load cases \['uniaxial_ext"),
        ({"response": torch.zeros(1, 3, 3)}, r"response must have shape"),
        ({"response": torch.full((1, 2, 3), math.nan)}, "response must be finite somewhere"),
        ({"response": torch.full((1, 2, 3), math.inf)}, "response must be finite somewhere"),
        ({"response": torch.zeros(0, 2, 3)}, "response must be finite somewhere"),
        (
            {"response": torch.tensor([[[1.0, 2.0, 3.0], [1.0, math.nan, -4.0]]])},
            "response must be non-negative, since this checkpoint was trained without a sign; got -4 in sample 0, load "
            "case 'shear'",
        ),
        ({"response": "stiff"}, "response must be a tensor or array of numbers, got str"),
        ({"response": 1j * torch.ones(1, 2, 3)}, "response must be a tensor or array of numbers, got Tensor"),
        ({"response": np.ones((1, 2, 3), bool)}, "response must be a tensor or array of numbers, got ndarray"),
        (
            {"response": torch.zeros(3, 2, 3), "batch_size": 2},
            "batch_size must be left out or be the 3 responses, got 2",
        ),
    ],
)
def test_a_response_of_another_kind_is_refused(make_pipeline, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_pipeline(conditional=True)(**arguments)


@pytest.mark.parametrize("response", [[[1.0, 2.0, 3.0], [0.0, math.nan, 0.0]], [[0.0] * 3, [math.nan] * 3]])
def test_a_response_may_be_zero_all_along_a_load_case(make_pipeline, response):
    """That is not the same as an unspecified one."""
    pipe = make_pipeline(conditional=True)
    zero = torch.tensor([response])
    unspecified = torch.where(zero == 0, math.nan, zero)
    unspecified = None if unspecified.isnan().all() else unspecified
    found, other = (latents_of(pipe, response=wanted, generator=generators(1)) for wanted in (zero, unspecified))
    assert found.isfinite().all()
    assert not torch.equal(found, other)


def signed_pipeline(make_pipeline, signed: bool = True):
    """A pipeline with a predictor whose responses may be negative."""
    pipe = make_pipeline(predictor=True)
    for name in ("response_encoder", "response_predictor"):
        part = getattr(pipe, name)
        again = type(part).from_config({**part.config, "spec": {**part.config.spec, "signed": signed}}).eval()
        again.load_state_dict(part.state_dict())
        pipe.register_modules(**{name: again})
    return pipe


def test_a_negative_response_is_followed_where_the_specification_is_signed(make_pipeline):
    response = torch.tensor([[[1.0, 2.0, 3.0], [-1.0, 0.0, -3.0]]])
    with pytest.raises(ValueError, match="^response must be non-negative"):
        signed_pipeline(make_pipeline, signed=False)(response=response)
    pipe = signed_pipeline(make_pipeline)
    options = {"num_candidates": 2, "num_refinements": 1}
    found, other = (
        latents_of(pipe, response=wanted, generator=generators(1), **options) for wanted in (response, response.abs())
    )
    assert found.isfinite().all()
    assert not torch.equal(found, other)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"quantity": "energy"}, "quantity 'energy', not 'stress'"),
        ({"units": "MPa"}, "units 'MPa', not 'modulus of the soft phase'"),
        ({"load_cases": ["shear", "uniaxial_extension"]}, r"load_cases \['shear', .* not \['uniaxial_extension', "),
        ({"strains": [[0.1, 0.2, 0.4]] * 2}, r"strains \[\[0.1, 0.2, 0.4\], .* not \[\[0.1, 0.2, 0.3\], "),
        ({"signed": True}, "signed True, not False"),
        ({"solver": {}}, "solver {'element_order': 2, .*}, not None"),
    ],
)
def test_a_response_of_another_specification_is_refused(make_pipeline, change, difference):
    pipe = make_pipeline(conditional=True)
    spec = replace(ResponseSpec.of(pipe), **change)
    with pytest.raises(
        ValueError, match=f"^spec must agree with what response_encoder was trained for, got {difference}"
    ):
        pipe(response=torch.ones(1, 2, 3), spec=spec)


def test_a_specification_that_is_none_or_for_a_checkpoint_without_responses_is_refused(pipe, make_pipeline):
    conditional = make_pipeline(conditional=True)
    spec = ResponseSpec.of(conditional)
    with pytest.raises(ValueError, match="^response must be None: this checkpoint was trained without responses"):
        pipe(response=torch.ones(1, 2, 3), spec=spec)
    with pytest.raises(ValueError, match="^spec must be None: this checkpoint was trained without responses"):
        pipe(spec=spec)
    for other in ("stress", spec.to_dict()):
        message = f"^spec must be a ResponseSpec, as .* got {re.escape(repr(other))}"
        with pytest.raises(ValueError, match=message):
            conditional(response=torch.ones(1, 2, 3), spec=other)


def test_a_response_of_the_specification_of_the_checkpoint_is_taken_to_nine_digits(make_pipeline):
    pipe = make_pipeline(conditional=True)
    stored = ResponseSpec.of(pipe)
    spec = replace(stored, strains=np.array(stored.strains) * (1 + 1e-15))  # such as np.linspace gives
    assert spec != stored
    found, expected = (
        latents_of(pipe, response=torch.ones(2, 2, 3), generator=generators(2), **options)
        for options in ({"spec": spec}, {})
    )
    torch.testing.assert_close(found, expected)


def test_a_view_of_an_array_is_a_response(make_pipeline):
    pipe = make_pipeline(conditional=True)
    view = np.arange(12.0).reshape(2, 2, 3)[:, ::-1, ::-1]
    found, expected = (
        latents_of(pipe, response=response, generator=generators(2)) for response in (view, torch.tensor(view.copy()))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 9, 9), r"images must have one channel and \(8, 8\) pixels"),
        (torch.zeros(1, 3, 8, 8), "images must have one channel"),
        (torch.zeros(8, 8), r"images must be \(B, H, W\)"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.complex64), "images must be real, got torch.complex64"),
        (torch.full((1, 1, 8, 8), math.nan), r"images must lie in \[0, 1\]"),
        (torch.full((1, 8, 8), 1.01), r"images must lie in \[0, 1\]"),
        (np.full((1, 8, 8), -0.5), r"images must lie in \[0, 1\]"),
    ],
)
def test_bad_images_are_refused(pipe, images, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        pipe.encode(images)


def test_bad_latents_and_ends_are_refused(pipe):
    for shape in ((1, 3, 4, 4), (2, 4, 4), (0, 2, 4, 4)):
        with pytest.raises(ValueError, match=rf"^latents must have shape \(B, 2, h, w\), got {re.escape(str(shape))}"):
            pipe.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="^b must be one image, got 2"):
        pipe.interpolate(torch.zeros(1, 8, 8), torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="^num must be an integer of at least 2, got 1"):
        pipe.interpolate(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), num=1)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), "scheduler must be one of DDIMScheduler, .*VDMScheduler, got EDMEulerScheduler"),
        (FlowMatchEulerDiscreteScheduler(), "scheduler must be one of DDIMScheduler, .*VDMScheduler, got FlowMatch"),
        (ScoreSdeVeScheduler(), "scheduler must be one of DDIMScheduler, .*VDMScheduler, got ScoreSdeVeScheduler"),
        (DDPMScheduler(prediction_type="v_prediction"), "scheduler must neither clip .* clip_sample=True"),
        (DDIMScheduler(clip_sample=False), "scheduler must have prediction_type='v_prediction', .* got DDIMScheduler"),
        (
            DDIMScheduler(clip_sample=False, prediction_type="v_prediction", beta_schedule="scaled_linear"),
            r"scheduler must have the noise schedule .* \('scaled_linear'\)",
        ),
        (
            DDPMScheduler(clip_sample=False, prediction_type="v_prediction", num_train_timesteps=500),
            "scheduler must have the noise schedule",
        ),
    ],
)
def test_a_scheduler_that_does_not_suit_the_model_is_refused(pipe, scheduler, message):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f"^{message}"):
        pipe(num_inference_steps=2)
