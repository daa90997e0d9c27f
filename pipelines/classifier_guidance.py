r"""Classifier guidance: samples drawn towards a target by the gradient of its log-likelihood.

By Bayes' rule :math:`\nabla \log p(x_t \mid y) = \nabla \log p(x_t) + \nabla \log p(y \mid x_t)` (Dhariwal & Nichol
2021, section 4; Luo 2022, "Guidance"). Both terms enter a step linearly, so the second one can be added after the step
that the scheduler takes with the first: over a step of the log-SNR from :math:`\lambda_t` to :math:`\lambda_s`

.. math:: x_s \leftarrow x_s + w \, \frac{\alpha_s}{\alpha_t} \sigma_t^2 \, k \, \nabla \log p(y \mid x_t)
    \approx x_s + w \, \sigma_t^2 \, k \, \nabla \log p(y \mid x_s),

where :math:`k = 1 - e^{\lambda_t - \lambda_s}` for a scheduler that draws noise, as in an ancestral step, and
:math:`k = 1 - e^{(\lambda_t - \lambda_s)/2}` for one that solves the probability flow, as in a step of DDIM. After the
step, only the gradient at its end is known. The gradient grows in proportion to :math:`\alpha`: at the start it is
:math:`\alpha_t / \alpha_s` times that at the end.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdiffusers.schedulers.log_snr_curve import LogSnrCurve

__all__ = ["ClassifierGuidance"]

# only the steps of these are those of the formula
_DETERMINISTIC = ("DDIMScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler", "ProbabilityFlowScheduler")
_STOCHASTIC = ("DDPMScheduler", "VDMScheduler")


class ClassifierGuidance:
    r"""A ``callback_on_step_end`` that guides samples towards a target.

    It suits ``DDPMScheduler``, ``VDMScheduler``, ``DDIMScheduler``, ``DPMSolverMultistepScheduler`` (its stochastic
    algorithms too), ``DEISMultistepScheduler``, and ``ProbabilityFlowScheduler`` without churn. The scheduler must
    evaluate the network once a timestep.

    Args:
        log_likelihood: Function of noisy latents ``(B, C, h, w)`` and a timestep ``()``: the log-likelihood of the
            target given each, shape ``(B,)``, differentiable in the latents.
        guidance_scale: Weight w of its gradient; 1 is Bayes' rule.

    Raises:
        ValueError: If ``guidance_scale`` is negative or not finite; when called, if the scheduler does not suit or
            ``log_likelihood`` does not give one number a sample.

    Example:
        >>> guidance = ClassifierGuidance(lambda latents, t: predictor.log_likelihood(latents, t, wanted))
        >>> images = pipe(batch_size=4, callback_on_step_end=guidance).images  # doctest: +SKIP

    References:
        | Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021)
        | https://arxiv.org/abs/2105.05233
    """

    def __init__(self, log_likelihood: Callable[[Tensor, Tensor], Tensor], guidance_scale: float = 1.0):
        if not 0 <= guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be a non-negative number, got {guidance_scale!r}")
        self.log_likelihood = log_likelihood
        self.guidance_scale = guidance_scale
        self._timesteps: list[float] | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the gradient to ``tensors["latents"]`` after a step."""
        timesteps = pipe.scheduler.timesteps.tolist()
        if step == 0 or timesteps != self._timesteps:
            self._weights, self._timesteps = _weights(pipe.scheduler), timesteps
        # some pipelines count the steps from where they begin, others those of all timesteps
        if float(timestep) not in timesteps:
            raise ValueError(f"timestep must be one of the scheduler's, {timesteps}, got {float(timestep):g}")
        step = timesteps.index(float(timestep))
        if step >= len(self._weights):  # the last step ends at clean data
            return {}
        latents = tensors["latents"]
        # a copy, because tensors of an inference_mode around the call have no gradient
        with torch.inference_mode(False), torch.enable_grad():
            variable = latents.detach().clone().requires_grad_()
            log_likelihood = self.log_likelihood(variable, pipe.scheduler.timesteps[step + 1].clone())
            if log_likelihood.shape != latents.shape[:1]:
                accepted, got = f"shape ({len(latents)},)", f"shape {tuple(log_likelihood.shape)}"
                raise ValueError(f"log_likelihood must give one number a sample, {accepted}, got {got}")
            (gradient,) = torch.autograd.grad(log_likelihood.sum(), variable)
        return {"latents": latents + self.guidance_scale * self._weights[step] * gradient}


def _weights(scheduler: Any) -> list[float]:
    """The weight of the gradient after each step but the last."""
    draws_noise = _draws_noise(scheduler)
    timesteps = scheduler.timesteps.cpu().double().numpy()
    if (np.diff(timesteps) >= 0).any():
        accepted = "once a timestep for classifier guidance, such as VDMScheduler or DDIMScheduler"
        raise ValueError(f"scheduler must evaluate the network {accepted}, got {type(scheduler).__name__}")
    log_snr = LogSnrCurve.of_scheduler(scheduler).at(timesteps)
    share = -np.expm1(-np.diff(log_snr) * (1 if draws_noise else 0.5))
    return (share / (1 + np.exp(log_snr[:-1]))).tolist()


def _draws_noise(scheduler: Any) -> bool:
    """Whether a scheduler's steps draw noise; a ``ValueError`` if they are not those of the formula."""
    # by name first: a configuration may have options of other classes
    kinds, config = [cls.__name__ for cls in type(scheduler).__mro__], scheduler.config
    name = next((kind for kind in kinds if kind in (*_DETERMINISTIC, *_STOCHASTIC)), kinds[0])
    if name == "DPMSolverMultistepScheduler":
        return config.algorithm_type.startswith("sde")
    churns = name == "ProbabilityFlowScheduler" and config.s_churn > 0
    if name not in (*_DETERMINISTIC, *_STOCHASTIC) or churns:
        accepted = f"one of {(*_STOCHASTIC, *_DETERMINISTIC)}, without churn, for classifier guidance"
        got = f"{name} with s_churn={config.s_churn}" if churns else name
        raise ValueError(f"scheduler must be {accepted}, got {got}")
    return name in _STOCHASTIC
