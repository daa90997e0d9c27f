r"""The stock schedulers that suit a variance-preserving latent model, by name.

A network trained on :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` with a table of betas can be sampled by any solver
of the same diffusion. Those of diffusers differ in order and in whether they add noise on the way; each keeps the betas
and the prediction type of the configuration it is made from.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from mechdiffusers.schedulers.variance_preserving_scheduler import NOISE_SCHEDULE

__all__ = ["STOCK_SCHEDULERS", "stock_scheduler"]

#: Name: class and the options that make it what its name says.
STOCK_SCHEDULERS: Mapping[str, tuple[type[SchedulerMixin], Mapping[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpmsolver++3m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "sde-dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "euler-karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "deis": (DEISMultistepScheduler, {}),
}


def stock_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """The stock scheduler of a name, with the noise schedule of another scheduler's configuration.

    Args:
        name: A key of :data:`STOCK_SCHEDULERS`.
        config: Configuration of a variance-preserving scheduler, such as ``pipe.scheduler.config``, of ours too: a
            log-SNR curve that no stock schedule is stands in it as ``trained_betas`` too.

    Returns:
        A scheduler that does not clip, as latents are unbounded.

    Raises:
        ValueError: If the name is unknown, or the network predicts the score, which no stock scheduler takes.

    Example:
        >>> stock_scheduler("ddim", DDPMScheduler(beta_schedule="squaredcos_cap_v2").config).config.beta_schedule
        'squaredcos_cap_v2'
    """
    if name not in STOCK_SCHEDULERS:
        raise ValueError(f"name must be one of {sorted(STOCK_SCHEDULERS)}, got {name!r}")
    if config.get("prediction_type") == "score":
        raise ValueError(
            "config must have a prediction_type that stock schedulers take, epsilon, v_prediction or sample, "
            "got 'score'"
        )
    scheduler_class, options = STOCK_SCHEDULERS[name]
    unclipped = {"clip_sample": False} if scheduler_class in (DDPMScheduler, DDIMScheduler) else {}
    # all of the noise schedule, which from_config drops where it stands at a default, and nothing of the old solver
    schedule = {key: config[key] for key in NOISE_SCHEDULE if key in config}
    if schedule.get("timestep_spacing") == "log_snr":  # ours alone; this one starts at pure noise too
        schedule["timestep_spacing"] = "trailing"
    return scheduler_class.from_config(schedule, **options, **unclipped)
