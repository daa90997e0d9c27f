import inspect
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from analytic_denoisers import GaussianMixture
from mechdiffusers.pipelines import ClassifierGuidance
from mechdiffusers.schedulers import PredictorCorrectorScheduler, ProbabilityFlowScheduler, VDMScheduler

#: Data N(MEAN, SPREAD^2), and what is known of them: TARGET, measured with a normal error.
MEAN, SPREAD, TARGET, ERROR = 0.3, 0.8, 1.5, 0.6
DATA = GaussianMixture([1.0], [[MEAN]], [[[SPREAD**2]]])
CURVE = VDMScheduler().curve


def log_likelihood(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """log p(TARGET | x_t), exactly."""
    log_snr = CURVE(t)
    clean = DATA.predict(x, log_snr, "sample")[:, 0]
    variance = ERROR**2 + 1 / (1 / SPREAD**2 + log_snr.exp())
    return -((TARGET - clean) ** 2) / (2 * variance)


def assert_bayes_rule(scheduler, steps: int, guidance_scale: float, bias: float) -> None:
    """Mean and standard deviation of guided samples agree within 4.5 standard errors and a bias of each."""
    num = 3000
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 1, generator=generator, dtype=torch.float64)
    pipe = SimpleNamespace(scheduler=scheduler)
    guidance = ClassifierGuidance(log_likelihood, guidance_scale)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    stochastic = {"generator": generator} if takes_generator else {}
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(DATA.predict(x, CURVE(t)), t, x, **stochastic).prev_sample
        x = guidance(pipe, i, t, {"latents": x}).get("latents", x)
    precision = 1 / SPREAD**2 + guidance_scale / ERROR**2
    mean, spread = (MEAN / SPREAD**2 + guidance_scale * TARGET / ERROR**2) / precision, precision**-0.5
    assert x.mean().item() == pytest.approx(mean, abs=4.5 * spread / math.sqrt(num) + bias)
    if steps > 50:  # few steps are too narrow
        assert x.std().item() == pytest.approx(spread, abs=4.5 * spread / math.sqrt(2 * num) + bias)


@pytest.mark.slow
def test_the_released_checkpoint_is_guided_to_a_volume_fraction_that_it_was_never_told(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "03_guide_by_volume_fraction.py"
    command = [sys.executable, str(example), "--steps", "300", "--volume_fraction", "0.3", "--output_dir", "guided"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(free|guided): volume fraction (\S+) \+- (\S+), wanted 0.300", done.stderr)
    (_, free, wide), (_, guided, narrow) = found
    assert abs(float(free) - 0.5) < 0.12  # 16 samples, three standard errors
    assert float(narrow) < float(wide) / 2
    assert abs(float(guided) - 0.3) < 0.06


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (DDPMScheduler, {"clip_sample": False}),
        (DDIMScheduler, {"clip_sample": False}),
        (DPMSolverMultistepScheduler, {}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (DEISMultistepScheduler, {}),
        (VDMScheduler, {}),
        (ProbabilityFlowScheduler, {"solver": "euler"}),
        (ProbabilityFlowScheduler, {"solver": "adams_bashforth"}),
    ],
)
def test_guided_samples_follow_bayes_rule(cls, options, guidance_scale):
    assert_bayes_rule(cls(timestep_spacing="trailing", **options), 200, guidance_scale, bias=0.02)


def test_few_steps_are_guided_no_further_than_to_the_target():
    # the gradient at a step's end, taken for that at its start, would overshoot by 0.1
    assert_bayes_rule(DDIMScheduler(timestep_spacing="trailing", clip_sample=False), 20, 1.0, bias=0.02)


@pytest.mark.parametrize("cls", [DDIMScheduler, VDMScheduler])
def test_guidance_from_no_signal_at_all_is_finite(cls):
    scheduler = cls(timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.set_timesteps(10)
    latents = {"latents": torch.zeros(2, 1)}
    guided = ClassifierGuidance(lambda x, t: x.sum(1))(SimpleNamespace(scheduler=scheduler), 0, 999, latents)
    torch.testing.assert_close(guided["latents"], torch.ones(2, 1), rtol=1e-2, atol=0)  # sigma_t^2 k of pure noise


def test_guidance_is_finite_where_hardly_any_noise_is_left():
    scheduler = VDMScheduler(log_snr="linear", log_snr_range=(20.0, -5.0))
    scheduler.set_timesteps(250)
    guidance, x = ClassifierGuidance(lambda x, t: -x.square().sum(1)), torch.ones(2, 1)
    for i, t in enumerate(scheduler.timesteps):
        assert guidance(SimpleNamespace(scheduler=scheduler), i, t, {"latents": x}).get("latents", x).isfinite().all()


@pytest.mark.parametrize("counted_from_the_cut", [True, False])
def test_a_loop_that_begins_later_is_guided_by_the_weights_of_its_timesteps(counted_from_the_cut):
    """As in stock pipelines of image to image, which cut the timesteps and count from there."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    pipe, seen = SimpleNamespace(scheduler=scheduler), []

    def likelihood(x, t):
        seen.append(float(t))
        return -x.square().sum(1)

    x = torch.ones(2, 1)
    whole, cut = ClassifierGuidance(likelihood), ClassifierGuidance(likelihood)
    expected = [whole(pipe, i, t, {"latents": x})["latents"] for i, t in enumerate(scheduler.timesteps[:-1])][6:]
    seen.clear()
    for i, t in enumerate(scheduler.timesteps[6:-1]):
        found = cut(pipe, i if counted_from_the_cut else i + 6, t, {"latents": x})["latents"]
        assert torch.equal(found, expected[i])
    assert seen == scheduler.timesteps[7:].tolist()
    with pytest.raises(ValueError, match="^timestep must be one of the scheduler's, .* got 123"):
        cut(pipe, 3, 123, {"latents": x})


def test_the_pipeline_takes_it(pipe):
    def wanted(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return -((latents.mean((1, 2, 3)) - 4) ** 2)

    seen = []

    def keep(guide):
        def callback(pipe, step, timestep, tensors):
            tensors = {**tensors, **guide(pipe, step, timestep, tensors)}
            seen.append(tensors["latents"].mean().item())
            return tensors

        return callback

    for scale in (0.0, 5.0):
        guide = ClassifierGuidance(wanted, scale)
        pipe(batch_size=2, num_inference_steps=10, generator=torch.manual_seed(0), callback_on_step_end=keep(guide))
    assert seen[-1] > seen[9] + 0.5


def test_inference_mode_around_a_call_changes_nothing(pipe):
    def log_likelihood(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return -((latents.mean((1, 2, 3)) - 4 * timestep / 1000) ** 2)

    def guided(scale: float = 3.0) -> torch.Tensor:
        callback = ClassifierGuidance(log_likelihood, scale)
        options = {"num_inference_steps": 4, "generator": torch.manual_seed(0), "output_type": "latent"}
        return pipe(batch_size=2, callback_on_step_end=callback, **options).images

    expected = guided()
    with torch.inference_mode():
        assert torch.equal(guided(), expected)
    assert not torch.equal(guided(0.0), expected)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (UniPCMultistepScheduler, {}),  # corrects a step from its own last sample, which knows no guidance
        (EulerDiscreteScheduler, {}),  # its latents are x / alpha
        (EulerAncestralDiscreteScheduler, {}),
        (DPMSolverSinglestepScheduler, {}),
        (PredictorCorrectorScheduler, {"num_corrector_steps": 0}),
        (PredictorCorrectorScheduler, {"predictor": "none"}),
        (ProbabilityFlowScheduler, {"solver": "euler", "s_churn": 2.0}),
    ],
)
def test_a_scheduler_whose_guided_samples_would_miss_bayes_rule_is_refused(cls, options):
    scheduler = cls(**options)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=f"^scheduler must be one of .* got {cls.__name__}"):
        ClassifierGuidance(log_likelihood)(SimpleNamespace(scheduler=scheduler), 0, 999, {"latents": torch.zeros(2, 1)})


def test_options_of_another_class_in_a_configuration_do_not_change_a_schedulers_kind():
    """Nor does a class derived from one that suits."""
    config = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++").config
    derived = type("MyScheduler", (DDIMScheduler,), {})
    weights = []
    for scheduler in (DDIMScheduler(), DDIMScheduler.from_config(config), derived()):
        scheduler.set_timesteps(10)
        guidance = ClassifierGuidance(lambda x, t: x.sum(1))
        weights.append(
            guidance(SimpleNamespace(scheduler=scheduler), 0, scheduler.timesteps[0], {"latents": torch.zeros(2, 1)})
        )
    assert torch.equal(weights[0]["latents"], weights[1]["latents"])
    assert torch.equal(weights[0]["latents"], weights[2]["latents"])


def test_what_cannot_be_guided_is_named():
    with pytest.raises(ValueError, match="^guidance_scale must be a non-negative number, got -1.0"):
        ClassifierGuidance(log_likelihood, -1.0)
    x = torch.zeros(2, 1)
    scheduler = ProbabilityFlowScheduler(solver="heun")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="^scheduler must evaluate .* got ProbabilityFlowScheduler"):
        ClassifierGuidance(log_likelihood)(
            SimpleNamespace(scheduler=scheduler), 0, scheduler.timesteps[0], {"latents": x}
        )
    scheduler = VDMScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(
        ValueError, match=r"^log_likelihood must give one number a sample, shape \(2,\), got shape \(2, 1"
    ):
        ClassifierGuidance(lambda x, t: x)(
            SimpleNamespace(scheduler=scheduler), 0, scheduler.timesteps[0], {"latents": x}
        )
