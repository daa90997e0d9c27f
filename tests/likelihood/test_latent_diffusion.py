"""The score, the way to noise and back, and the way between two latents by noise."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler

from device_without_double import METAL, DeviceWithoutDouble
from exact_pipeline import exact_diffusion, exact_pipeline, rotated_gaussian
from mechdiffusers.likelihood import ContinuousDiffusion, LatentDiffusion
from mechdiffusers.likelihood.latent_diffusion import as_float64
from mechdiffusers.schedulers import VDMScheduler
from mechdiffusers.schedulers.log_snr_curve import LogSnrCurve

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "score")
ROTATED = rotated_gaussian([0.3, 0.7, 1.3, 2.0])
SHAPE = (2, 4, 4)  # of the latents of 8 x 8 pixels


def latents_of(mixture, num, seed=1):
    return mixture.sample(num, torch.Generator().manual_seed(seed))[:, None, None]


def random_latents(num, seed=0):
    return torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_all_prediction_types_give_the_same_score(prediction_type):
    pipe = exact_pipeline(ROTATED, VDMScheduler(prediction_type=prediction_type))
    latents = latents_of(ROTATED, 3)
    timesteps = torch.tensor([0.0, 300.5, 900.0])
    expected = ROTATED.score(latents.flatten(1), pipe.scheduler.curve(timesteps)).reshape(latents.shape)
    diffusion = LatentDiffusion(pipe)
    torch.testing.assert_close(diffusion.score(latents, timesteps), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(diffusion.score(latents[1:2], 300.5), expected[1:2], rtol=1e-3, atol=1e-4)


def test_the_score_of_plain_latents_keeps_no_graph(pipe):
    assert all(weight.requires_grad for weight in pipe.unet.parameters())
    latents, diffusion = random_latents(2), LatentDiffusion(pipe)
    for _ in range(2):  # an ascent along it
        latents = latents + 0.01 * diffusion.score(latents, 20)
        assert latents.grad_fn is None
        assert not latents.requires_grad
    assert not diffusion.velocity(latents, torch.zeros(2).double()).requires_grad
    assert all(weight.grad is None and weight.requires_grad for weight in pipe.unet.parameters())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_score_is_differentiable_by_latents_that_ask_for_it(make_pipeline, prediction_type):
    pipe = make_pipeline(prediction_type=prediction_type)
    pipe.to(torch.float64)
    diffusion, latents = LatentDiffusion(pipe), random_latents(2).double()
    direction, weights = random_latents(2, seed=1).double(), random_latents(2, seed=2).double()
    variable = latents.clone().requires_grad_()
    (weights * diffusion.score(variable, 400)).sum().backward()
    ahead, behind = (diffusion.score(latents + step * direction, 400) for step in (1e-5, -1e-5))
    expected = (weights * (ahead - behind)).sum() / 2e-5
    torch.testing.assert_close((variable.grad * direction).sum(), expected, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        assert diffusion.score(variable, 400).grad_fn is None


def test_the_score_is_one_of_each_latents_own_response(make_pipeline):
    pipe, latents = make_pipeline(conditional=True), random_latents(2)
    responses = torch.tensor([1.0, 2.0])[:, None, None].expand(2, 2, 3)
    together, first = LatentDiffusion(pipe, responses), LatentDiffusion(pipe, responses[:1])
    torch.testing.assert_close(first.score(latents, 300)[0], together.score(latents, 300)[0])
    free = LatentDiffusion(pipe).score(latents, 300)
    assert (free != together.score(latents, 300)).any()
    assert (first.score(latents, 300)[1] != together.score(latents, 300)[1]).any()


@pytest.mark.parametrize("options", [{"num_steps": 32}, {"tolerance": 1e-8}], ids=["fixed", "adaptive"])
def test_latents_flow_to_noise_and_back(options):
    diffusion = LatentDiffusion(exact_pipeline(ROTATED, DDPMScheduler(prediction_type="epsilon", clip_sample=False)))
    latents = latents_of(ROTATED, 8)
    noise = diffusion.to_noise(latents, **options)
    torch.testing.assert_close(diffusion.from_noise(noise, **options), latents, rtol=1e-5, atol=1e-5)
    # a Gaussian's flow scales its principal axes to unit variance
    variances, axes = torch.linalg.eigh(ROTATED.covariance)
    whitened = latents.flatten(1) @ axes / variances.sqrt() @ axes.T
    torch.testing.assert_close(noise.flatten(1), whitened, rtol=1e-3, atol=1e-3)


def test_a_denoiser_of_any_kind_has_a_flow_and_a_score():
    scheduler = VDMScheduler(log_snr="linear", log_snr_range=(13.3, -16.0), prediction_type="v_prediction")
    diffusion, latents = exact_diffusion(ROTATED, scheduler), latents_of(ROTATED, 8)
    pipe = LatentDiffusion(exact_pipeline(ROTATED, scheduler))
    # which is given its timesteps in single precision
    torch.testing.assert_close(diffusion.to_noise(latents), pipe.to_noise(latents), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(diffusion.score(latents, 300), pipe.score(latents, 300))


def test_a_float32_network_agrees_with_the_same_in_float64(pipe):
    latents = random_latents(2)

    def found():
        diffusion = LatentDiffusion(pipe)
        return diffusion.score(latents, 300), diffusion.to_noise(latents, num_steps=4), diffusion.from_noise(latents)

    single = found()
    pipe.to(torch.float64)
    torch.testing.assert_close(single, found(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_found_is_float64_whatever_the_latents_are(pipe, dtype):
    latents, diffusion = random_latents(2).to(dtype), LatentDiffusion(pipe)
    found = (
        diffusion.score(latents, 20),
        diffusion.to_noise(latents, num_steps=2),
        diffusion.from_noise(latents, num_steps=2),
        diffusion.interpolate(latents[:1], latents[1:], num=3, num_steps=2),
        diffusion.log_snr(torch.tensor([0.0, 20.5])),
        diffusion.timesteps(torch.tensor([0.0, 3.0])),
    )
    assert {each.dtype for each in found} == {torch.float64}


def test_arrays_are_latents_too(pipe):
    latents, diffusion = random_latents(2), LatentDiffusion(pipe)
    assert torch.equal(diffusion.score(latents.numpy(), 20), diffusion.score(latents, 20))
    assert torch.equal(diffusion.to_noise(latents.numpy(), num_steps=2), diffusion.to_noise(latents, num_steps=2))
    ways = [diffusion.interpolate(*latents_of, 3, 2) for latents_of in (latents.split(1), np.split(latents.numpy(), 2))]
    assert torch.equal(*ways)


def test_double_precision_is_taken_on_the_cpu_where_a_device_has_none(pipe, monkeypatch):
    latents, designs = random_latents(2), torch.randint(0, 2, (2, 1, 8, 8), generator=torch.manual_seed(0)).float()

    def found(latents):
        diffusion = LatentDiffusion(pipe)
        return (
            as_float64(latents),
            diffusion.score(latents, 20),
            diffusion.score(latents, torch.tensor([20.0, 30.5], device=latents.device)),
            diffusion.to_noise(latents, num_steps=2),
            diffusion.from_noise(latents, tolerance=0.1),
            diffusion.interpolate(latents[:1], latents[1:], num=3, num_steps=2),
        )

    expected, images = found(latents), pipe.interpolate(designs[:1], designs[1:], num=3, output_type="np")
    monkeypatch.setattr(type(pipe), "_execution_device", METAL)
    with DeviceWithoutDouble():
        with pytest.raises(TypeError, match="float64"):
            latents.to(METAL).double()
        there = found(latents.to(METAL))
        np.testing.assert_array_equal(pipe.interpolate(designs[:1], designs[1:], num=3, output_type="np"), images)
        assert {(each.dtype, each.device.type) for each in there} == {(torch.float64, "cpu")}
    assert all(torch.equal(one, other) for one, other in zip(there, expected, strict=True))


def test_timesteps_are_the_inverse_of_log_snrs_limited_to_the_ends():
    for scheduler in (DDPMScheduler(clip_sample=False), VDMScheduler(log_snr="cosine")):
        diffusion = exact_diffusion(ROTATED, scheduler)
        timesteps = torch.tensor([0.0, 0.25, 300.5, 999.0], dtype=torch.float64)
        torch.testing.assert_close(diffusion.timesteps(diffusion.log_snr(timesteps)), timesteps)
        assert diffusion.timesteps(torch.tensor([100.0, -100.0])).tolist() == [0.0, 999.0]


def test_the_ends_of_a_way_are_the_two_latents():
    diffusion = LatentDiffusion(exact_pipeline(ROTATED))
    a, b = latents_of(ROTATED, 2).split(1)
    for num in (2, 3, 8):
        path = diffusion.interpolate(a, b, num=num)
        assert path.shape == (num, 1, 1, 4)
        assert torch.equal(path[:1], a)
        assert torch.equal(path[-1:], b)
    back = diffusion.interpolate(b, a, num=8)
    torch.testing.assert_close(back.flip(0), path)


def test_points_between_two_samples_have_the_datas_second_moments_where_straight_lines_lose_them():
    stds = [0.2, 0.3, 0.5, 0.7, 0.8, 1.0, 1.2, 1.5]
    gaussian, num = rotated_gaussian(stds), 200
    diffusion = LatentDiffusion(exact_pipeline(gaussian, VDMScheduler(log_snr="linear", log_snr_range=(13.3, -12.0))))
    samples = latents_of(gaussian, 2 * num)
    pairs = list(zip(samples[:num].split(1), samples[num:].split(1), strict=True))
    paths = torch.cat([diffusion.interpolate(a, b, num=4, num_steps=4)[1:3] for a, b in pairs])
    lines = torch.cat([torch.lerp(a, b, share) for a, b in pairs for share in (1 / 3, 2 / 3)])
    variances, axes = torch.linalg.eigh(gaussian.covariance)

    def share_of_the_datas_variance(latents):
        return (latents.flatten(1) @ axes).square().mean(0) / variances

    # the variance of a third of one and two thirds of the other is 5/9; that of a variance of 2 num values is 1 / num
    tolerance = 4 / num**0.5
    assert (share_of_the_datas_variance(paths) - 1).abs().max() < tolerance
    assert abs(share_of_the_datas_variance(paths).mean() - 1) < tolerance / len(stds) ** 0.5
    assert abs(share_of_the_datas_variance(lines).mean() - 5 / 9) < tolerance / len(stds) ** 0.5


def test_between_latents_of_a_round_gaussian_the_way_is_the_great_circle():
    diffusion = LatentDiffusion(exact_pipeline(rotated_gaussian([0.5] * 2)))
    a, b = torch.tensor([[0.7, 0.0]]).reshape(1, 1, 1, 2), torch.tensor([[0.0, 0.7]]).reshape(1, 1, 1, 2)
    angles = math.pi / 2 * torch.linspace(0, 1, 5, dtype=torch.float64)
    expected = 0.7 * torch.stack([angles.cos(), angles.sin()], dim=1).reshape(5, 1, 1, 2)
    torch.testing.assert_close(diffusion.interpolate(a, b, num=5), expected, rtol=1e-4, atol=1e-6)


def test_equal_ends_give_the_same_latent_and_opposite_ones_finite_ones():
    gaussian = rotated_gaussian([0.5, 1.0, 0.7])
    diffusion = LatentDiffusion(exact_pipeline(gaussian))
    a = latents_of(gaussian, 1)
    path = diffusion.interpolate(a, a.clone(), num=5, num_steps=32)
    torch.testing.assert_close(path, a.expand(5, -1, -1, -1), rtol=1e-5, atol=1e-5)
    longer = diffusion.interpolate(a, 2 * a, num=3, num_steps=32)  # on one ray, where no arc leads
    torch.testing.assert_close(longer, torch.cat([a, 1.5 * a, 2 * a]), rtol=1e-5, atol=1e-5)
    assert diffusion.interpolate(a, -a, num=3).isfinite().all()


def test_a_response_leads_the_way(make_pipeline):
    pipe, (a, b) = make_pipeline(conditional=True), random_latents(2).split(1)
    free, given = (LatentDiffusion(pipe, r).interpolate(a, b, 3, 2) for r in (None, torch.ones(1, 2, 3)))
    assert torch.equal(free[[0, 2]], given[[0, 2]])
    assert (free[1] != given[1]).any()


def test_the_pipelines_own_interpolation_is_the_short_way_to_it(pipe):
    designs = torch.randint(0, 2, (2, 1, 8, 8), generator=torch.manual_seed(0)).float()
    latents = pipe.encode(designs)
    path = LatentDiffusion(pipe).interpolate(latents[:1], latents[1:], num=5)
    images = pipe.interpolate(designs[:1], designs[1:], num=5, output_type="pt")
    assert torch.equal(images, pipe.decode(path.float()))
    assert torch.equal(images[[0, -1]], pipe.decode(latents))
    as_arrays = pipe.interpolate(designs[:1, 0].numpy(), designs[1:, 0].numpy(), 5, "np")
    np.testing.assert_array_equal(as_arrays, images.permute(0, 2, 3, 1).numpy())
    assert len(pipe.interpolate(designs[:1], designs[1:])) == 8  # of pictures


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda it: it.score(torch.zeros(2, 1, 1, 3), 5), "latents must have shape"),
        (lambda it: it.score(torch.zeros(2, 1, 4), 5), "latents must have shape"),
        (lambda it: it.score(torch.zeros(2, 1, 1, 4), 1000), "timestep must be"),
        (lambda it: it.score(torch.zeros(2, 1, 1, 4), -1), "timestep must be"),
        (lambda it: it.score(torch.zeros(2, 1, 1, 4), math.nan), "timestep must be"),
        (lambda it: it.score(torch.zeros(2, 1, 1, 4), torch.zeros(3)), "timestep must be"),
        (lambda it: it.to_noise(torch.zeros(2, 1, 1, 3)), "latents must have shape"),
        (lambda it: it.to_noise(torch.zeros(1, 1, 1, 4), num_steps=3), "num_steps must be an even integer"),
        (lambda it: it.to_noise(torch.zeros(1, 1, 1, 4), num_steps=True), "num_steps must be an even integer"),
        (lambda it: it.from_noise(torch.zeros(1, 1, 1, 4), tolerance=0.0), "tolerance must lie inside"),
        (lambda it: it.from_noise(torch.zeros(1, 1, 2, 4)), "latents must have shape"),
        (lambda it: it.interpolate(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4)), "a and b must be one latent"),
        (lambda it: it.interpolate(torch.zeros(1, 1, 1, 4), torch.zeros(2, 1, 1, 4)), "a and b must be one latent"),
        (lambda it: it.interpolate(torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)), "latents must have shape"),
        (lambda it: it.interpolate(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), 1), "num must be an integer"),
        (lambda it: it.interpolate(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), 2.0), "num must be an integer"),
        (lambda it: it.interpolate(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), True), "num must be an integer"),
        (lambda it: it.interpolate(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), 3, 5), "num_steps must be an even"),
        (lambda it: LatentDiffusion(it.pipe, torch.ones(1, 2, 3)), "response must be None"),
        (lambda it: ContinuousDiffusion(None, LogSnrCurve([1.0, -1.0], 2), "flow"), "prediction_type must be one of"),
    ],
)
def test_bad_input_is_named(call, message):
    diffusion = LatentDiffusion(exact_pipeline(rotated_gaussian([0.3] * 4)))
    with pytest.raises(ValueError, match=f"^{message}"):
        call(diffusion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 1}, "num must be an integer of at least 2, got 1"),
        ({"num": 2.5}, "num must be an integer"),
        ({"output_type": "latent"}, "output_type must be one of"),
        ({"a": torch.zeros(2, 1, 8, 8)}, "a must be one image, got 2"),
        ({"b": torch.zeros(2, 1, 8, 8)}, "b must be one image, got 2"),
        ({"b": torch.zeros(1, 1, 8, 9)}, "images must have one channel"),
    ],
)
def test_bad_input_of_the_short_way_is_named(pipe, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        pipe.interpolate(**{"a": torch.zeros(1, 1, 8, 8), "b": torch.ones(1, 1, 8, 8), **options})


def test_responses_for_another_number_of_latents_are_refused(make_pipeline):
    pipe = make_pipeline(conditional=True)
    for response in (torch.ones(2, 3), torch.ones(2, 2, 4)):
        with pytest.raises(ValueError, match="^response must"):
            LatentDiffusion(pipe, response)
    diffusion = LatentDiffusion(pipe, torch.ones(3, 2, 3))
    for call in (diffusion.to_noise, diffusion.from_noise, lambda latents: diffusion.score(latents, 5)):
        with pytest.raises(ValueError, match="^response must be one, or one for each of 2 samples, got 3"):
            call(random_latents(2))


def test_a_scheduler_that_the_denoiser_was_not_trained_for_is_refused(pipe):
    pipe.scheduler = DDIMScheduler(clip_sample=False, prediction_type="epsilon")
    with pytest.raises(ValueError, match="^scheduler must have prediction_type='v_prediction'"):
        LatentDiffusion(pipe)
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="^scheduler must be one of .*VDMScheduler, got EDMEulerScheduler"):
        LatentDiffusion(pipe)
