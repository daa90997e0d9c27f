"""What a denoiser was trained for: one noise schedule, and one thing to predict.

Both stand in the configuration of the scheduler that comes with the weights. Any solver of the same diffusion may take
its place; one of another noise schedule or another prediction would draw samples of nothing, without a word.

This file travels inside checkpoints: it imports torch and diffusers alone.
"""

import os
from typing import Any

import torch
from diffusers import DiffusionPipeline

__all__ = ["TrainedNoiseSchedule"]


class TrainedNoiseSchedule(DiffusionPipeline):
    """The part of a latent diffusion pipeline that knows which schedulers suit its denoiser."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "TrainedNoiseSchedule":
        """As in diffusers, from safetensors alone, from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: Folder of a checkpoint, or its repository on the Hub as ``"owner/name"``.
            **kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``, such as ``dtype``, ``revision`` or
                ``scheduler``, which takes the place of the checkpoint's and has to suit the same denoiser.

        Raises:
            ValueError: If there is no such checkpoint, it may not be read, or a file of it is damaged; or if
                ``scheduler`` has another noise schedule or prediction type than the checkpoint's.

        Example:
            >>> ddim = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", clip_sample=False)  # doctest: +SKIP
            >>> pipe = LatentDDPMPipeline.from_pretrained(folder, scheduler=ddim)  # doctest: +SKIP
        """
        scheduler = kwargs.pop("scheduler", None)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if scheduler is not None:  # only now, so that the checkpoint's own says what the denoiser was trained for
            pipe.register_modules(scheduler=scheduler)
            pipe._check_scheduler()
        return pipe

    def _take_as_trained_with(self, scheduler: Any) -> None:
        """Takes a scheduler as the one that the denoiser was trained with; a ``ValueError`` if it cannot be."""
        self._check_variance_preserving(scheduler)
        self._trained_for = (scheduler.config.prediction_type, scheduler.alphas_cumprod.cpu())

    def _check_variance_preserving(self, scheduler: Any) -> None:
        name, config = type(scheduler).__name__, scheduler.config
        if not hasattr(scheduler, "alphas_cumprod") or "prediction_type" not in config:
            raise ValueError(
                f"scheduler must be variance preserving with betas and a prediction type, such as DDPMScheduler, "
                f"DDIMScheduler or DPMSolverMultistepScheduler, got {name}, which is of another kind"
            )
        for option in ("clip_sample", "thresholding", "use_flow_sigmas"):
            if config.get(option, False):
                raise ValueError(
                    f"scheduler must neither clip nor follow another process, got {name} with {option}=True; "
                    f"make it by {name}.from_config(pipe.scheduler.config, {option}=False)"
                )

    def _check_scheduler(self) -> None:
        """Raises a ``ValueError`` if the scheduler was replaced by one that the denoiser was not trained for."""
        self._check_variance_preserving(self.scheduler)
        prediction_type, alphas_cumprod = self._trained_for
        name, config = type(self.scheduler).__name__, self.scheduler.config
        remedy = f"make it by {name}.from_config(pipe.scheduler.config)"
        if config.prediction_type != prediction_type:
            raise ValueError(
                f"scheduler must have prediction_type={prediction_type!r}, as the denoiser was trained, "
                f"got {name} with {config.prediction_type!r}; {remedy}"
            )
        betas_differ = self.scheduler.alphas_cumprod.shape != alphas_cumprod.shape or not torch.allclose(
            self.scheduler.alphas_cumprod.cpu(), alphas_cumprod, atol=1e-6
        )
        if betas_differ:
            raise ValueError(
                f"scheduler must have the noise schedule that the denoiser was trained with, got {name} with "
                f"another one ({config.get('beta_schedule')!r}); {remedy}"
            )
