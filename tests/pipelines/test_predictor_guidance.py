"""Samples drawn towards a wanted response by a network that predicts it."""

import json
import math
from collections import Counter

import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from exact_pipeline import Denoiser, LinearAutoencoder, rotated_gaussian
from mechdiffusers.evaluation.inverse_design import response_error
from mechdiffusers.models import ResponseEncoder, ResponsePredictor
from mechdiffusers.models.response_predictor import _TOLERANCE
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import (
    PredictorCorrectorScheduler,
    ProbabilityFlowScheduler,
    VDMScheduler,
    stock_scheduler,
)

DIMS = 5
KINDS = ["epsilon", "v_prediction", "sample", "score"]
REPO = "mechanic/predicted"
SPEC = {"load_cases": ["a", "b"], "strains": [[0.1, 0.2, 0.3]] * 2}
RESPONSES = {"spec": SPEC, **{name: [[1.0] * 3] * 2 for name in ("scale", "mean", "std")}}


class LinearPredictor(ResponsePredictor):
    """Its normalised response (B, 2, 3) is linear in the pixels (B, 1, 1, DIMS), and is the response itself."""

    def __init__(self) -> None:
        super().__init__(block_out_channels=(4,), layers_per_block=1, **RESPONSES)
        self.double()
        generator = torch.Generator().manual_seed(1)
        self.matrix = torch.randn(2, 3, DIMS, generator=generator, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("lsd,bd->bls", self.matrix, images.flatten(1)) + 3

    def denormalise(self, values: Tensor) -> Tensor:
        return values


class LinearEncoder(ResponseEncoder):
    def __init__(self) -> None:
        super().__init__(token_dim=1, hidden_dim=4, **RESPONSES)

    def normalise(self, response: Tensor) -> Tensor:
        return response.double()


def linear_pipeline(prediction_type: str = "v_prediction") -> LatentDDPMPipeline:
    """Exact Gaussian latents, a linear decoder and a linear predictor."""
    scheduler = VDMScheduler(log_snr="linear", prediction_type=prediction_type)
    denoiser = Denoiser(rotated_gaussian([0.1, 0.15, 0.2, 0.25, 0.3]), scheduler)
    vae = LinearAutoencoder(DIMS, 0.7, 0.5, gain=0.8)
    vae.register_to_config(_decoder_likelihood="discretized_logistic", _decoder_scale=0.01)
    pipe = LatentDDPMPipeline(vae, denoiser, scheduler, LinearEncoder(), LinearPredictor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def observation(pipe: LatentDDPMPipeline, given: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix (L, DIMS) and offset (L,) from latents to the means of the given (L, S) responses."""
    rows = torch.where(given[..., None], pipe.response_predictor.matrix, 0.0).sum(1) / given.sum(1)[:, None]
    vae = pipe.vae
    matrix = rows * vae.gain / vae.config.scaling_factor / 2
    offset = rows.sum(1) * (vae.gain * vae.config.shift_factor + 1) / 2 + 3
    return matrix, offset


def predictions(pipe: LatentDDPMPipeline, timestep: float) -> tuple[Tensor, Tensor, Tensor]:
    """Three noisy latents, what the denoiser says that has found the clean ones, and those."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 1, 1, DIMS, generator=generator, dtype=torch.float64) for _ in range(2))
    clean = 0.2 * clean
    log_snr = torch.tensor(pipe._log_snr(timestep), dtype=torch.float64)
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    said = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * clean,
        "sample": clean,
        "score": -noise / sigma,
    }
    return alpha * clean + sigma * noise, said[pipe.scheduler.config.prediction_type], clean


def clean_of(pipe: LatentDDPMPipeline, prediction: Tensor, noisy: Tensor, timestep: float) -> Tensor:
    log_snr = torch.tensor(pipe._log_snr(timestep), dtype=torch.float64)
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    return {
        "epsilon": lambda: (noisy - sigma * prediction) / alpha,
        "v_prediction": lambda: alpha * noisy - sigma * prediction,
        "sample": lambda: prediction,
        "score": lambda: (noisy + sigma**2 * prediction) / alpha,
    }[pipe.scheduler.config.prediction_type]()


def responses(num: int = 3) -> Tensor:
    return 2 + 2 * torch.rand(num, 2, 3, generator=torch.manual_seed(2), dtype=torch.float64)


def unspecified_entries() -> Tensor:
    """Two strains of one load case, one of the other are given."""
    given = torch.tensor([[True, False, True], [False, True, False]])
    return responses().masked_fill(~given, math.nan)


@pytest.mark.parametrize("timestep", [20.0, 350.5])
@pytest.mark.parametrize("wanted", [responses(), unspecified_entries()], ids=["given", "unspecified in part"])
def test_the_move_is_that_of_conditioning_a_gaussian(wanted, timestep):
    """N(clean, sigma^2), of which a linear observation is known to be N(target, tolerance^2)."""
    pipe = linear_pipeline()
    noisy, prediction, clean = predictions(pipe, timestep)
    matrix, offset = observation(pipe, ~wanted[0].isnan())
    precision = 1 + math.exp(pipe._log_snr(timestep))  # 1 / sigma^2
    found = clean_of(pipe, pipe._guide_by_predictor(prediction, noisy, timestep, wanted, 1.0), noisy, timestep)
    covariance = torch.linalg.inv(precision * torch.eye(DIMS, dtype=torch.float64) + matrix.T @ matrix / _TOLERANCE**2)
    target = wanted.nanmean(-1)
    expected = (precision * clean.flatten(1) + (target - offset) @ matrix / _TOLERANCE**2) @ covariance
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("timestep", [3.0, 500.0])
def test_guidance_is_the_same_whatever_the_denoiser_predicts(timestep):
    found = []
    for kind in KINDS:
        pipe = linear_pipeline(kind)
        noisy, prediction, clean = predictions(pipe, timestep)
        guided = pipe._guide_by_predictor(prediction, noisy, timestep, responses(), 2.5)
        found.append(clean_of(pipe, guided, noisy, timestep))
    assert (found[0] - clean).abs().max() > 1e-5
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


def test_the_weight_multiplies_the_move():
    pipe = linear_pipeline()
    noisy, prediction, _ = predictions(pipe, 350.0)
    once, twice = (pipe._guide_by_predictor(prediction, noisy, 350.0, responses(), w) - prediction for w in (1.0, 2.0))
    torch.testing.assert_close(twice, 2 * once)


def test_an_unspecified_load_case_does_not_pull():
    pipe = linear_pipeline()
    noisy, prediction, _ = predictions(pipe, 350.0)
    wanted = responses()
    wanted[:, 1] = math.nan
    moved = pipe._guide_by_predictor(prediction, noisy, 350.0, wanted, 1.0)
    with torch.no_grad():
        pipe.response_predictor.matrix[1].mul_(100)
    assert torch.equal(pipe._guide_by_predictor(prediction, noisy, 350.0, wanted, 1.0), moved)
    with torch.no_grad():
        pipe.response_predictor.matrix[0].mul_(2)
    assert not torch.equal(pipe._guide_by_predictor(prediction, noisy, 350.0, wanted, 1.0), moved)


def test_all_responses_pull_alike_however_many_are_moved_at_once(monkeypatch):
    pipe = linear_pipeline()
    noisy, prediction, _ = predictions(pipe, 350.0)
    together = pipe._guide_by_predictor(prediction, noisy, 350.0, responses(), 1.0)
    monkeypatch.setattr("mechdiffusers.pipelines.pipeline_latent_ddpm._BATCH", 2)
    torch.testing.assert_close(pipe._guide_by_predictor(prediction, noisy, 350.0, responses(), 1.0), together)


def test_guided_samples_land_nearer_to_the_predicted_target():
    pipe = linear_pipeline()
    source = torch.rand(8, 1, 1, DIMS, generator=torch.manual_seed(3), dtype=torch.float64) * 0.2 + 0.5
    wanted = pipe.response_predictor.predict(source)
    levels, error = wanted.mean(-1), {}
    for scale in (0.0, 1.0, 4.0):
        images = pipe(
            response=wanted,
            num_images_per_response=4,
            num_inference_steps=30,
            generator=torch.manual_seed(0),
            predictor_guidance_scale=scale,
            output_type="pt",
        ).images
        found = pipe.predict_response(images).mean(-1).unflatten(0, (8, 4))
        error[scale] = (found - levels[:, None]).square().mean().sqrt().item()
    assert error[1.0] < error[0.0] / 3
    assert error[4.0] < error[0.0] / 3


@pytest.fixture
def pipe(make_pipeline) -> LatentDDPMPipeline:
    """The real parts, small, with random weights, and a predictor."""
    return make_pipeline(predictor=True)


WANTED = torch.tensor([[[0.2, 4.0, 30.0]] * 2, [[3.0, 20.0, 90.0]] * 2, [[1.0, math.nan, 9.0], [math.nan] * 3]])


def latents_of(pipe: LatentDDPMPipeline, **options: object) -> Tensor:
    """The last latents of a call, which tell more than binary images."""
    kept = []

    def keep(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        return tensors

    pipe(num_inference_steps=4, callback_on_step_end=keep, output_type="pt", **options)
    return kept[-1]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_without_a_weight_or_a_response_nothing_changes_to_the_bit(pipe):
    alone = LatentDDPMPipeline(pipe.vae, pipe.unet, pipe.scheduler, pipe.response_encoder)
    alone.set_progress_bar_config(disable=True)
    without = latents_of(alone, response=WANTED, generator=seeded())
    assert torch.equal(
        latents_of(pipe, response=WANTED, generator=seeded(), predictor_guidance_scale=0.0),
        without,
    )
    assert not torch.allclose(latents_of(pipe, response=WANTED, generator=seeded()), without, atol=1e-3)
    assert torch.equal(
        latents_of(pipe, batch_size=3, generator=seeded()), latents_of(alone, batch_size=3, generator=seeded())
    )


def loads_while_offloaded(pipe: LatentDDPMPipeline, monkeypatch, **options: object) -> tuple[Counter, Tensor]:
    """How often a device would load each part, by accelerate's hooks, and the last latents.

    A hook sends the part before it away, and loads its own part where it is not there already.
    """
    names = {id(part): name for name, part in pipe.components.items()}
    there, loads, pre_forward = set(), Counter(), CpuOffload.pre_forward

    def watch(hook, module, *args, **kwargs):
        if hook.prev_module_hook is not None:
            there.discard(names[id(hook.prev_module_hook.model)])
        name = names[id(module)]
        loads[name] += name not in there
        there.add(name)
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", watch)
    pipe.enable_model_cpu_offload(device="cpu")
    return loads, latents_of(pipe, response=WANTED, generator=seeded(), **options)


def test_offloading_loads_each_part_once_a_call_and_not_once_a_step(pipe, monkeypatch):
    expected = latents_of(pipe, response=WANTED, generator=seeded())
    loads, latents = loads_while_offloaded(pipe, monkeypatch)
    assert loads == dict.fromkeys(("response_encoder", "unet", "vae", "response_predictor"), 1)
    assert torch.equal(latents, expected)


def test_a_chain_in_which_the_decoder_follows_the_denoiser_would_load_it_once_a_step(pipe, monkeypatch):
    monkeypatch.setattr(LatentDDPMPipeline, "model_cpu_offload_seq", "response_encoder->unet->vae")
    loads, _ = loads_while_offloaded(pipe, monkeypatch)
    assert loads["unet"] == 3  # guidance acts in two of the four steps


def test_offloading_never_sends_the_decoder_away_that_the_gradient_goes_through(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = {name: pipe.components[name]._hf_hook for name in ("response_encoder", "unet", "vae", "response_predictor")}
    sent_away = {name: hook.prev_module_hook and hook.prev_module_hook.model for name, hook in hooks.items()}
    assert sent_away["unet"] is pipe.response_encoder
    assert pipe.vae not in sent_away.values()
    assert pipe.response_predictor not in sent_away.values()


def test_inference_mode_around_a_call_changes_nothing(pipe):
    expected = latents_of(pipe, response=WANTED, generator=seeded())
    with torch.inference_mode():
        found = latents_of(pipe, response=WANTED.clone(), generator=seeded())
    assert torch.equal(found, expected)


def test_guidance_in_half_precision_stays_near_that_in_single_precision(pipe):
    latents = torch.randn(3, *pipe.latent_shape, generator=seeded()).bfloat16()
    images = pipe._expected_images(latents.float())
    wanted = 1.2 * pipe.response_predictor.denormalise(pipe.response_predictor(images).detach())
    expected = mean_shift(pipe, latents.float(), wanted, 0.5).flatten(1)
    pipe.to(torch.bfloat16)
    found = mean_shift(pipe, latents, wanted, 0.5).flatten(1)
    # the networks themselves round to 4e-3 in each layer
    assert ((found - expected).norm(dim=1) < 0.15 * expected.norm(dim=1)).all()
    latents = latents_of(pipe, response=WANTED, generator=seeded())
    assert latents.dtype == torch.bfloat16
    assert latents.isfinite().all()


def test_a_response_that_is_predicted_already_moves_nothing_in_half_precision(pipe):
    pipe.to(torch.bfloat16)
    latents = torch.randn(3, *pipe.latent_shape, generator=seeded()).bfloat16()
    predicted = pipe.response_predictor(pipe._expected_images(latents)).detach()
    move = mean_shift(pipe, latents, pipe.response_predictor.denormalise(predicted), 0.5)
    assert move.abs().max() < 1e-4


def mean_shift(pipe: LatentDDPMPipeline, latents: Tensor, wanted: Tensor, variance: float) -> Tensor:
    target = pipe.response_encoder.normalise(wanted)
    return pipe.response_predictor.posterior_mean_shift(pipe._expected_images, latents, target, variance)


class LargestOf(TorchDispatchMode):
    """Sees the most entries of a tensor of one kind."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.entries = dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.dtype == self.dtype:
                self.entries = max(self.entries, tensor.numel())
        return made


def test_only_the_systems_of_the_load_cases_are_in_double_precision_which_some_devices_lack(pipe):
    latents = torch.randn(3, *pipe.latent_shape, generator=seeded())
    with LargestOf(torch.float64) as seen:
        mean_shift(pipe, latents, WANTED, 0.5)
    assert seen.entries == 3 * 2 * 2


@pytest.mark.parametrize(("num_candidates", "num_refinements"), [(1, 0), (3, 0), (3, 2)])
def test_a_design_depends_neither_on_the_batch_nor_on_how_many_follow(pipe, num_candidates, num_refinements):
    pipe.to(torch.float64)  # in which a batch rounds to less than it could hide
    options = {"num_candidates": num_candidates, "num_refinements": num_refinements}
    together = latents_of(pipe, response=WANTED, generator=seeded(), **options)
    first = latents_of(pipe, response=WANTED[:1], generator=seeded(), **options)
    torch.testing.assert_close(first, together[:num_candidates], rtol=0, atol=1e-9)
    own = latents_of(pipe, response=WANTED, generator=[seeded().manual_seed(i) for i in range(3)], **options)
    last = latents_of(pipe, response=WANTED[2:], generator=[seeded().manual_seed(2)], **options)
    torch.testing.assert_close(last, own[-num_candidates:], rtol=0, atol=1e-9)


def test_of_an_images_own_candidates_the_nearest_is_kept(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    latents = torch.randn(12, *pipe.latent_shape, generator=seeded())
    options = {"response": WANTED, "latents": latents, "num_inference_steps": 4, "output_type": "pt"}
    every = pipe(num_images_per_response=4, **options).images
    kept = pipe(num_candidates=4, **options).images
    error = response_error(pipe.predict_response(every), WANTED.repeat_interleave(4, dim=0)).unflatten(0, (3, 4))
    assert (error.amax(1) > error.amin(1)).all()
    for own, image, distance in zip(every.unflatten(0, (3, 4)), kept, error, strict=True):
        assert torch.equal(image, own[distance.argmin()])


OURS = {
    "vdm": (VDMScheduler, {}),
    "flow-heun": (ProbabilityFlowScheduler, {"solver": "heun"}),
    "flow-adams": (ProbabilityFlowScheduler, {"solver": "adams_bashforth"}),
    "predictor-corrector": (PredictorCorrectorScheduler, {}),
}


@pytest.mark.parametrize("name", [*OURS, "ddim", "dpmsolver++", "heun", "euler-karras", "ddpm"])
@pytest.mark.parametrize("num_candidates", [1, 4])
def test_a_refined_image_is_predicted_no_farther_from_its_target_and_some_are_nearer(pipe, name, num_candidates):
    if name in OURS:
        own, options = OURS[name]
        pipe.scheduler = own.from_config(pipe.scheduler.config, **options)
    else:
        pipe.scheduler = stock_scheduler(name, pipe.scheduler.config)
    options = {"response": WANTED, "num_images_per_response": 4, "num_inference_steps": 12, "output_type": "pt"}
    errors = []
    for num in (0, 1, 4):
        images = pipe(num_refinements=num, num_candidates=num_candidates, generator=seeded(), **options).images
        errors.append(response_error(pipe.predict_response(images), WANTED.repeat_interleave(4, dim=0)))
    assert (errors[1] <= errors[0] + 1e-6).all()
    assert (errors[2] <= errors[1] + 1e-6).all()
    assert (errors[2] < errors[0]).any()  # the networks of this pipeline have learned nothing


def test_a_refinement_takes_the_last_steps_again(pipe):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, float(pipe._log_snr(timestep)), len(tensors["latents"])))
        return tensors

    options = {"num_inference_steps": 20, "num_refinements": 2, "callback_on_step_end": watch}
    pipe(response=WANTED, num_candidates=3, generator=seeded(), **options)
    steps = [step for step, _, _ in seen]
    begin = steps[20]
    assert steps == [*range(20), *range(begin, 20), *range(begin, 20)]
    assert [log_snr >= 1 for _, log_snr, _ in seen[:20]] == [step >= begin for step in range(20)]
    assert 0 < begin < 19
    assert {num for _, _, num in seen} == {9}


def nearest_of(pipe: LatentDDPMPipeline, predicted: Tensor, wanted: Tensor, monkeypatch) -> list[int]:
    """Which of the images with these predicted responses (B, N, L, S) is kept for each of the targets."""
    num = predicted.shape[1]
    monkeypatch.setattr(pipe, "predict_response", lambda images: predicted.flatten(0, 1)[images.long().ravel()])
    images = torch.arange(predicted.flatten(0, 1).shape[0], dtype=torch.float32).reshape(-1, 1, 1, 1)
    kept, latents = pipe._best(images, images + 0.5, wanted)
    assert torch.equal(latents, kept + 0.5)
    return (kept.flatten() - num * torch.arange(len(wanted))).long().tolist()


def test_candidates_are_chosen_by_the_error_that_designs_are_judged_by(pipe, monkeypatch):
    wanted = WANTED.repeat(20, 1, 1)
    predicted = wanted.nan_to_num(5.0)[:, None] * torch.exp(torch.randn(60, 16, 2, 3, generator=seeded()))
    error = torch.stack([response_error(found, target) for found, target in zip(predicted, wanted, strict=True)])
    assert nearest_of(pipe, predicted, wanted, monkeypatch) == error.argmin(1).tolist()


def test_candidates_for_a_target_of_zeros_are_chosen_by_the_error_that_designs_are_judged_by(pipe, monkeypatch):
    zeros = torch.tensor([[[0.0, math.nan, 0.0], [1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, math.nan]]])
    wanted = zeros.repeat(20, 1, 1)
    predicted = wanted.nan_to_num(5.0)[:, None] + torch.randn(40, 16, 2, 3, generator=seeded())
    error = torch.stack([response_error(found, target) for found, target in zip(predicted, wanted, strict=True)])
    assert nearest_of(pipe, predicted, wanted, monkeypatch) == error.argmin(1).tolist()


def test_a_prediction_that_is_not_finite_is_never_the_nearest(pipe, monkeypatch):
    wanted = torch.tensor([[[0.0, math.nan, 0.0], [1.0, 2.0, 3.0]]])
    predicted = torch.tensor([[math.nan, 1.0], [0.1, 1.2], [math.inf, 1.0], [9.0, 1.1]])[
        None, :, :, None
    ] * torch.tensor([1.0, 2.0, 3.0])
    # the last is nearer in the second load case, and far from the zeros that the first is to have
    assert nearest_of(pipe, predicted, wanted, monkeypatch) == [1]
    assert nearest_of(pipe, predicted[:, [2, 3]], wanted, monkeypatch) == [1]
    assert nearest_of(pipe, predicted[:, :2], 0 * wanted, monkeypatch) == [1]


def test_predicted_responses_are_those_of_the_predictor(pipe):
    designs = (torch.rand(5, 8, 8, generator=seeded()) < 0.5).float()
    found = pipe.predict_response(designs)
    assert found.shape == (5, 2, 3)
    assert torch.equal(found, pipe.response_predictor.predict(designs[:, None]))
    assert torch.equal(pipe.predict_response(designs.numpy()[..., None]), found)
    assert not found.requires_grad


def test_however_many_designs_are_predicted_few_are_seen_at_once(pipe, monkeypatch):
    designs = (torch.rand(5, 8, 8, generator=seeded()) < 0.5).float()
    together, sizes = pipe.predict_response(designs), []
    pipe.response_predictor.register_forward_pre_hook(lambda module, images: sizes.append(len(images[0])))
    monkeypatch.setattr("mechdiffusers.pipelines.pipeline_latent_ddpm._BATCH", 2)
    torch.testing.assert_close(pipe.predict_response(designs), together)
    assert max(sizes) == 2


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_number_of_candidates_that_is_none_is_named(pipe, count):
    with pytest.raises(ValueError, match="^num_candidates must be an integer of at least 1, got"):
        pipe(response=WANTED, num_candidates=count)
    with pytest.raises(ValueError, match="^num_refinements must be an integer of at least 0, got"):
        pipe(response=WANTED, num_refinements=-1 if count == 0 else count)


@pytest.mark.parametrize("scale", [-1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_named(pipe, scale):
    with pytest.raises(ValueError, match="^predictor_guidance_scale must be a non-negative number, got"):
        pipe(response=WANTED, predictor_guidance_scale=scale)


def test_what_needs_a_predictor_or_a_response_says_so(pipe, make_pipeline):
    with pytest.raises(
        ValueError, match="^num_candidates must be 1 without a response or without a response_predictor .* 2$"
    ):
        pipe(num_candidates=2)
    with pytest.raises(ValueError, match="^num_refinements must be 0 without a response or .* got 2$"):
        pipe(num_refinements=2)
    without = make_pipeline(conditional=True)
    with pytest.raises(
        ValueError, match="^num_candidates must be 1 without a response or without a response_predictor .* 2$"
    ):
        without(response=WANTED, num_candidates=2)
    with pytest.raises(ValueError, match="^response_predictor must be part of the checkpoint to predict"):
        without.predict_response(torch.zeros(1, 8, 8))


@pytest.mark.parametrize("designs", [torch.zeros(1, 8, 9), torch.full((1, 8, 8), 1.5), torch.full((1, 8, 8), math.nan)])
def test_responses_of_what_is_no_design_are_not_predicted(pipe, designs):
    with pytest.raises(ValueError, match="^images must"):
        pipe.predict_response(designs)


def test_a_checkpoint_comes_back_with_its_predictor(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = LatentDDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.response_predictor) is ResponsePredictor
    files = {path.name for path in (tmp_path / "response_predictor").iterdir()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors", "response_predictor.py"}
    expected = latents_of(pipe, response=WANTED, generator=seeded())
    assert torch.equal(latents_of(loaded, response=WANTED, generator=seeded()), expected)


@pytest.mark.parametrize("older", [False, True])
def test_a_checkpoint_without_a_predictor_works_as_before(make_pipeline, tmp_path, older):
    pipe = make_pipeline(conditional=True)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["response_predictor"] == [None, None]
    if older:  # than the predictor: its index does not know of one
        del index["response_predictor"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = LatentDDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.response_predictor is None
    expected = latents_of(pipe, response=WANTED, generator=seeded())
    assert torch.equal(latents_of(loaded, response=WANTED, generator=seeded()), expected)


@pytest.mark.slow
def test_plain_diffusers_loads_a_predictor_from_a_folder_and_the_hub_and_guides_by_it(
    hub, pipe, tmp_path, plain_diffusers
):
    pipe.save_pretrained(tmp_path / "checkpoint")
    pipe.push_to_hub(REPO)
    options = {"response": WANTED, "num_inference_steps": 3, "num_candidates": 2, "output_type": "pt"}
    images = pipe(generator=seeded(), **options).images
    torch.save((options, images, pipe.predict_response(images)), tmp_path / "expected.pt")
    script = """
        import torch
        from diffusers import DiffusionPipeline

        options, expected, responses = torch.load("expected.pt")
        for name in ("checkpoint", "mechanic/predicted", "again"):
            pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, use_safetensors=True)
            images = pipe(generator=torch.Generator().manual_seed(0), **options).images
            assert torch.equal(images, expected), name
            assert torch.equal(pipe.predict_response(images), responses), name
            pipe.save_pretrained("again")
    """
    plain_diffusers(script)


def test_a_predictor_of_other_responses_is_refused(pipe):
    parts = pipe.components
    spec = {**pipe.response_predictor.config.spec, "units": "another modulus"}
    parts["response_predictor"] = ResponsePredictor.from_config({**pipe.response_predictor.config, "spec": spec})
    with pytest.raises(
        ValueError, match="^response_predictor must predict the responses of .* got another units: 'another modulus', "
    ):
        LatentDDPMPipeline(**parts)


def test_a_specification_in_tuples_is_that_in_lists(pipe):
    spec = pipe.response_encoder.config.spec
    spec = {name: tuple(entry) if isinstance(entry, list) else entry for name, entry in spec.items()}
    predictor = ResponsePredictor.from_config({**pipe.response_predictor.config, "spec": spec})
    assert predictor.config.spec != pipe.response_encoder.config.spec
    LatentDDPMPipeline(**{**pipe.components, "response_predictor": predictor})
