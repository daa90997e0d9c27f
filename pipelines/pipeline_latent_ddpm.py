r"""Latent diffusion of microstructures: generate, invert a response, encode, decode.

A design :math:`x` has latents :math:`z_0 = s (z - m)`, where :math:`z` is the autoencoder's code and the shift
:math:`m` and scale :math:`s` are those measured on the training data (``shift_factor`` and ``scaling_factor`` of the
autoencoder). A variance-preserving diffusion :math:`z_t = \alpha_t z_0 + \sigma_t \epsilon` of them is reversed by a
denoiser (Rombach et al. 2022, section 3; Luo 2022, "Variational Diffusion Models").

The autoencoder is a latent-variable model, whose decoder is a probability mass function of the pixels:

``bernoulli``
    Binary designs. The network's output is the logit of the pixel being stiff.
``discretized_logistic``
    8-bit images. The network's output, taken from [-1, 1] to [0, 1] as diffusers does, is the mean of a logistic
    distribution with one common ``scale``; a pixel value has the mass of its bin of width 1/255, and the bins at 0 and
    1 are open, so that the 256 masses sum to 1 (Salimans et al. 2017, section 2.1).

Two ways lead to a wanted response: the denoiser attends to tokens of it, with classifier-free guidance (Ho & Salimans
2021), and a network that predicts the response of a design shifts the denoiser's estimate :math:`\hat z_0`, see
``response_predictor.py``.

This file travels inside checkpoints: it imports torch, numpy, diffusers and its sibling alone.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from .portable_checkpoint import PortableCheckpoint

__all__ = [
    "DecoderLikelihood",
    "LatentDDPMPipeline",
    "decoder_log_prob",
    "decoder_meaning",
    "decoder_output",
    "latent_size",
    "most_likely_images",
    "output_from_velocity",
    "posterior_of",
    "record_training_schedule",
]

DecoderLikelihood = Literal["bernoulli", "discretized_logistic"]

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_LEVELS = 255
#: Images that go through a network at once, where their number is the caller's choice.
_BATCH = 64
#: Solvers of the variance-preserving diffusion. Others walk other paths, the other way or in other steps.
_SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("PNDMScheduler", "UniPCMultistepScheduler"),
    *("PredictorCorrectorScheduler", "ProbabilityFlowScheduler", "VDMScheduler"),
)
#: Settings with which these, too, would sample something else.
_UNFIT_SETTINGS = {
    **{"clip_sample": True, "thresholding": True, "use_flow_sigmas": True},
    **{"timestep_type": "continuous", "interpolation_type": "log_linear"},
}
#: Timesteps at which the schedule of a training is written down.
_RECORDED = 21
#: The log-SNR before which the decoder makes nothing of :math:`\hat z_0` that a predictor could tell of.
_LEAST_LOG_SNR = -2.5
#: The log-SNR to which a kept sample is re-noised: a few in a hundred pixels change.
_REFINEMENT_LOG_SNR = 1.0


class LatentDDPMPipeline(PortableCheckpoint, DiffusionPipeline):
    r"""Generates microstructures with a diffusion model of an autoencoder's latents.

    Images are single-channel, in [0, 1]: PIL images, numpy ``(B, H, W, C)``, torch ``(B, C, H, W)``, or designs
    ``(B, H, W)`` of either kind. 0 is the soft phase, 1 the stiff one.

    Args:
        vae ([`AutoencoderKL`]):
            Autoencoder; ``sample_size`` in its configuration is the size of the designs, which need not be a multiple
            of its factor: they are padded and cropped. ``_decoder_likelihood`` says what the decoder's output means
            (``"bernoulli"`` where it is missing), ``_decoder_scale`` is the scale of a ``"discretized_logistic"`` one.
        unet ([`UNet2DConditionModel`]):
            Denoiser of the latents; attends to the tokens of ``response_encoder``. ``_training_schedule`` in its
            configuration is what it was trained for; where it is missing, that of ``scheduler`` is recorded there.
        scheduler ([`SchedulerMixin`]):
            A variance-preserving scheduler with the betas and prediction type that the denoiser was trained with.
        response_encoder ([`ResponseEncoder`]):
            Makes tokens of responses, and the null tokens of a sample without one.
        response_predictor ([`ResponsePredictor`], *optional*):
            Predicts the response of a design, to draw samples towards a wanted one.

    Raises:
        ValueError: If the parts do not fit together or the scheduler does not suit.

    Example:
        >>> pipe = LatentDDPMPipeline.from_pretrained("checkpoints/composites-32")  # doctest: +SKIP
        >>> images = pipe(batch_size=4, generator=torch.manual_seed(0)).images  # doctest: +SKIP

    References:
        | High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022)
        | https://arxiv.org/abs/2112.10752
        | Classifier-Free Diffusion Guidance (Ho & Salimans, 2021)
        | https://arxiv.org/abs/2207.12598
        | Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023)
        | https://openreview.net/forum?id=9_gsMA8MRKQ
        | PixelCNN++ (Salimans et al., 2017), section 2.1, on the discretised logistic distribution
        | https://arxiv.org/abs/1701.05517
    """

    # Left out of the chain: vae and response_predictor, whose hooks would move the denoiser to the CPU at every step
    model_cpu_offload_seq = "response_encoder->unet"
    _optional_components: ClassVar = ["response_predictor"]
    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds"]

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        response_encoder: ModelMixin,
        response_predictor: ModelMixin | None = None,
    ):
        super().__init__()
        _check_parts(vae, unet, response_encoder, response_predictor)
        _check_kind_of_scheduler(scheduler)
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            response_encoder=response_encoder,
            response_predictor=response_predictor,
        )
        if "_training_schedule" not in unet.config:
            record_training_schedule(unet, scheduler)
        self.check_scheduler()
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_grayscale=True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in :class:`PortableCheckpoint`; a ``scheduler`` that is given has to suit the checkpoint's denoiser."""
        scheduler = kwargs.pop("scheduler", None)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if scheduler is not None:  # only now: the scheduler of an earlier layout says what its denoiser was trained for
            pipe.register_modules(scheduler=scheduler)
            pipe.check_scheduler()
        return pipe

    def _upgrade(self, index: dict[str, Any]) -> None:
        if "decoder_likelihood" in index:  # which was an argument of the pipeline once
            meaning = {f"_{name}": index[name] for name in ("decoder_likelihood", "decoder_scale")}
            self.vae.register_to_config(**meaning)

    @property
    def decoder_likelihood(self) -> str:
        """What the decoder's output means: ``"bernoulli"`` or ``"discretized_logistic"``."""
        return decoder_meaning(self.vae)[0]

    @property
    def decoder_scale(self) -> float | None:
        """Scale of a ``"discretized_logistic"`` decoder on [0, 1]."""
        return decoder_meaning(self.vae)[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the designs."""
        return _image_size(self.vae)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a design."""
        return (self.vae.config.latent_channels, *latent_size(self.vae))

    @property
    def guidance_scale(self) -> float:
        """Of the call that runs; a callback may change ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of the scheduler's timesteps in the call that runs."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set ``_interrupt`` to end the call that runs after its step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        response: Tensor | np.ndarray | None = None,
        batch_size: int = 1,
        num_images_per_response: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        predictor_guidance_scale: float = 4.0,
        num_candidates: int = 1,
        num_refinements: int = 0,
        meaning: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""Generates images.

        Args:
            response (`torch.Tensor` or `np.ndarray`, *optional*):
                Wanted responses, shape ``(B, L, S)``, NaN where unspecified; ``response_encoder.config.meaning`` has
                their load cases, strains, quantity and units.
            batch_size (`int`, defaults to 1): Number of images without a ``response``.
            num_images_per_response (`int`, defaults to 1):
                Images for each response; the images of one response are neighbours.
            height (`int`, *optional*):
                Height in pixels, by default that of the checkpoint's designs, to which alone a ``response`` belongs.
            width (`int`, *optional*): Likewise.
            num_inference_steps (`int`, defaults to 50): Number of denoising steps.
            timesteps (`Sequence[float]`, *optional*):
                The steps themselves, for schedulers whose ``set_timesteps`` takes them.
            sigmas (`Sequence[float]`, *optional*): Likewise, by their noise levels.
            guidance_scale (`float`, defaults to 1.0):
                Weight :math:`w` of classifier-free guidance :math:`u + w (c - u)`, from the prediction without to the
                one with a ``response`` (Imagen, Saharia et al. 2022, equation 2); 1 is none.
            eta (`float`, defaults to 0.0): Share of the noise of DDIM's steps, for schedulers whose ``step`` takes it.
            generator (`torch.Generator` or a list of them, *optional*):
                Source of all random numbers. A list has one for each image. A single one is spread to one for each
                image first, so that image ``i`` does not depend on how many images follow.
            latents (`torch.Tensor`, *optional*):
                Gaussian noise to start from, shape ``(images, C, h, w)``, the candidates of an image being neighbours.
            output_type (`str`, defaults to `"pil"`):
                ``"pil"``, ``"np"`` (B, H, W, C), ``"pt"`` (B, C, H, W) or ``"latent"`` (B, C, h, w).
            return_dict (`bool`, defaults to `True`): Whether to return an [`ImagePipelineOutput`], not a tuple.
            callback_on_step_end (`Callable`, [`PipelineCallback`] or [`MultiPipelineCallbacks`], *optional*):
                Called as ``callback_on_step_end(pipe, step, timestep, tensors)`` after every step, those of refinements
                too; the tensors that it returns replace these.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, defaults to `("latents",)`):
                Which tensors a function is given: ``"latents"``, and ``"prompt_embeds"``, the tokens of the responses
                by the name that stock callbacks know, behind those without a response while guidance acts.
            guidance_rescale (`float`, defaults to 0.0):
                Share of the guided prediction's standard deviation that is brought back to the conditional one's, in
                [0, 1] (Lin et al. 2024, section 3.4).
            guidance_start (`float`, defaults to 0.0):
                Fraction of the steps after which guidance starts (Kynkäänniemi et al. 2024).
            guidance_stop (`float`, defaults to 1.0):
                Fraction of the steps after which it stops; outside, the conditional prediction stands alone.
            predictor_guidance_scale (`float`, defaults to 4.0):
                Weight of the guidance by ``response_predictor``; 0 is none. 1 is the theoretical weight. 4 gave the
                lowest error in our benchmark. It acts with a ``response`` and a predictor alone.
            num_candidates (`int`, defaults to 1):
                Images drawn for each one that is returned, the best by predicted response. More than one needs a
                ``response`` and a predictor.
            num_refinements (`int`, defaults to 0):
                Number of SDEdit rounds (Meng et al. 2022): re-noise the best image to log-SNR 1, denoise
                ``num_candidates`` variants, keep the best by predicted response. It needs what candidates need.
            meaning (`dict`, *optional*):
                What the entries of ``response`` mean, as ``mechdiffusers.response_meaning`` reads it from a dataset.
                Without it only the shape of a response is compared with the checkpoint's.

        Returns:
            [`ImagePipelineOutput`], or a tuple of the images.

        Raises:
            ValueError: If an argument is out of range or does not fit the checkpoint, or the scheduler does not suit.
        """
        self.check_scheduler()
        _check_output_type(output_type)
        counts = {"batch_size": batch_size, "num_images_per_response": num_images_per_response}
        counts |= {"num_inference_steps": num_inference_steps, "num_candidates": num_candidates}
        for name, count in counts.items():
            _check_count(name, count, 1)
        _check_count("num_refinements", num_refinements, 0)
        scales = {"guidance_scale": guidance_scale, "predictor_guidance_scale": predictor_guidance_scale}
        for name, scale in scales.items():
            _check_number(name, scale)
        shares = {"guidance_rescale": guidance_rescale, "guidance_start": guidance_start}
        for name, share in {**shares, "guidance_stop": guidance_stop, "eta": eta}.items():
            _check_number(name, share, 1)
        if guidance_start > guidance_stop:
            raise ValueError(f"guidance_start must be at most guidance_stop={guidance_stop!r}, got {guidance_start!r}")
        size = self._checked_size(height, width, response)
        steps = self._checked_steps(num_inference_steps, timesteps, sigmas)
        step_kwargs = self._checked_step_kwargs(eta)
        predicts = response is not None and self.response_predictor is not None
        for name, count, none in (("num_candidates", num_candidates, 1), ("num_refinements", num_refinements, 0)):
            if count != none and not predicts:
                raise ValueError(
                    f"{name} must be {none} without a response or without a response_predictor to choose by, "
                    f"got {count}"
                )
        if num_refinements and not self.scheduler.config.get("skip_prk_steps", True):
            raise ValueError(
                "num_refinements must be 0 with PNDMScheduler's Runge-Kutta steps, which cannot begin midway, got "
                f"{num_refinements}; skip_prk_steps=True leaves them out"
            )
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )
        device, dtype = self._execution_device, self.unet.dtype

        responses = self.response_encoder.prepare(response, batch_size)
        if meaning is not None:
            self.response_encoder.check_meaning("meaning", meaning)
        responses = responses.repeat_interleave(num_images_per_response, dim=0)
        num_images = len(responses)
        generator = _one_for_each(generator, num_images)
        if num_candidates > 1:
            responses = responses.repeat_interleave(num_candidates, dim=0)
            num_images *= num_candidates
            if generator is not None:
                generator = [each for one in generator for each in _spread(one, num_candidates)]
        shape = (num_images, self.unet.config.in_channels, *latent_size(self.vae, size))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif not isinstance(latents, Tensor) or latents.shape != shape:
            kind = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents must be a tensor of shape {shape}, got {kind}")
        elif not latents.isfinite().all():
            raise ValueError("latents must be finite, got NaN or an infinite one")

        responses = responses.to(device)
        tokens = self.response_encoder(responses)
        null_tokens = self.response_encoder(torch.full_like(responses, math.nan))
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator
        self._interrupt = False

        def denoise(latents: Tensor, begin: int = 0) -> Tensor:
            self._guidance_scale = guidance_scale
            num_steps = self._num_timesteps = len(self.scheduler.timesteps)
            guided = range(int(guidance_start * num_steps), int(guidance_stop * num_steps))
            prompt_embeds = tokens
            if response is not None and guidance_scale != 1:
                prompt_embeds = torch.cat([null_tokens, tokens])
            for i, t in enumerate(self.progress_bar(self.scheduler.timesteps[begin:]), begin):
                if self.interrupt:
                    continue
                model_input = self.scheduler.scale_model_input(latents, t)
                if len(prompt_embeds) > num_images and self._guidance_scale != 1 and i in guided:
                    prediction = self.unet(torch.cat([model_input] * 2), t, encoder_hidden_states=prompt_embeds).sample
                    unconditional, conditional = prediction.chunk(2)
                    prediction = _guide(unconditional, conditional, self._guidance_scale, guidance_rescale)
                else:
                    prediction = self.unet(model_input, t, encoder_hidden_states=prompt_embeds[-num_images:]).sample
                if predicts and predictor_guidance_scale:
                    scale = predictor_guidance_scale
                    prediction = self._guide_by_predictor(prediction, model_input, t, responses, scale)
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs).prev_sample.to(dtype)
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                    asked_for = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, asked_for)
                    latents = changed.pop("latents", latents)
                    embeds = changed.pop("prompt_embeds", prompt_embeds)
                    # a stock cut-off keeps the last row, as of a single image
                    prompt_embeds = embeds if len(embeds) >= num_images else prompt_embeds[-num_images:]
            return latents

        self.scheduler.set_timesteps(**steps, device=device)
        latents = denoise(latents.to(device, dtype) * self.scheduler.init_noise_sigma)
        images = self._most_likely_images(latents, size)
        if num_candidates > 1:
            images, latents = self._best(images, latents, responses[::num_candidates])
        for _ in range(num_refinements):
            self.scheduler.set_timesteps(**steps, device=device)  # forgets the steps before
            begin = self._refinement_begin()
            noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            variants = latents.repeat_interleave(num_candidates, dim=0)
            start = self.scheduler.timesteps[begin].expand(len(variants))
            variants = denoise(self.scheduler.add_noise(variants, noise, start).to(dtype), begin)
            if self.interrupt:  # they are unfinished
                break
            images, latents = self._best(
                _beside(images, self._most_likely_images(variants, size)),
                _beside(latents, variants),
                responses[::num_candidates],
            )
        images = latents if output_type == "latent" else self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode(
        self,
        images: PipelineImageInput,
        sample_posterior: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Latents of images: the posterior's mean, or a draw from it.

        Args:
            images: Images of the checkpoint's size, see the class.
            sample_posterior: Whether to draw from the posterior instead of taking its mean.
            generator: Source of the draws; a list has one for each image.

        Returns:
            Latents, shape ``(B, C, h, w)``, in the space that the denoiser works in.

        Raises:
            ValueError: If the images have another size, lie outside [0, 1] or hold NaN, or there is not one generator
                or one for each image.
        """
        pixels = self.prepare_images(images)
        generator = _one_for_each(generator, len(pixels))
        parts = pixels.to(self._execution_device, self.vae.dtype).split(_BATCH)
        posteriors = [posterior_of(self.vae, part) for part in parts]
        codes = torch.cat([posterior.mean for posterior in posteriors])
        if sample_posterior:
            noise = randn_tensor(codes.shape, generator=generator, device=codes.device, dtype=codes.dtype)
            codes = codes + torch.cat([posterior.std for posterior in posteriors]) * noise
        return (codes - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pt") -> Any:
        """The most likely image of each of the latents: binary, or multiples of 1/255, as the decoder's likelihood is.

        Args:
            latents: Shape ``(B, C, h, w)``, as :meth:`encode` gives them. Those of another height or width than the
                checkpoint's give images of the autoencoder's factor times their size.
            output_type: ``"pt"`` (B, C, H, W), ``"np"`` (B, H, W, C) or ``"pil"``.

        Returns:
            Images in [0, 1].

        Raises:
            ValueError: If the latents have another shape, or ``output_type`` is unknown.
        """
        _check_output_type(output_type, _OUTPUT_TYPES[:3])
        channels = self.vae.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels or not latents.numel():
            raise ValueError(f"latents must have shape (B, {channels}, h, w), got {tuple(latents.shape)}")
        height, width = (_factor(self.vae) * side for side in latents.shape[2:])
        size = self.image_size if latents.shape[1:] == self.latent_shape else (height, width)
        return self.image_processor.postprocess(self._most_likely_images(latents, size), output_type)

    @torch.no_grad()
    def predict_response(self, images: PipelineImageInput) -> Tensor:
        """Predicts the response of images without a simulation.

        Args:
            images: Images of the checkpoint's size, see the class.

        Returns:
            Shape ``(B, L, S)``, float32, in the units of the checkpoint.

        Raises:
            ValueError: If the checkpoint has no predictor, or the images have another size or lie outside [0, 1].

        Example:
            >>> pipe.predict_response(images)  # doctest: +SKIP
        """
        if self.response_predictor is None:
            raise ValueError("response_predictor must be part of the checkpoint to predict a response, got none")
        return self._predicted(self.prepare_images(images))

    def log_likelihood(self, images: PipelineImageInput, **options: Any) -> Any:
        """The evidence lower bound of images, by the package: ``LatentLikelihood(pipe).elbo(images, **options)``.

        Raises an ``ImportError`` where mechdiffusers is not installed.

        Example:
            >>> pipe.log_likelihood(designs).bits_per_dim.mean()  # doctest: +SKIP
        """
        return _likelihood_package().LatentLikelihood(self).elbo(images, **options)

    def interpolate(self, a: PipelineImageInput, b: PipelineImageInput, num: int = 8, output_type: str = "pil") -> Any:
        """Images between two images, by way of noise, by the package: ``LatentDiffusion(pipe).interpolate``.

        Args:
            a: The image to start from, one, see the class for its kinds.
            b: The image to end at.
            num: Number of images, both ends included, at least 2.
            output_type: ``"pil"``, ``"np"`` (num, H, W, C) or ``"pt"`` (num, C, H, W).

        Raises:
            ImportError: If mechdiffusers is not installed.
            ValueError: If ``num`` is below 2, or ``a`` or ``b`` is not one image of the checkpoint's size.
        """
        _check_output_type(output_type, _OUTPUT_TYPES[:3])
        diffusion, ends = _likelihood_package().LatentDiffusion(self), {"a": self.encode(a), "b": self.encode(b)}
        for name, end in ends.items():
            if len(end) != 1:
                raise ValueError(f"{name} must be one image, got {len(end)}")
        return self.decode(diffusion.interpolate(**ends, num=num).to(ends["a"]), output_type)

    def prepare_images(self, images: PipelineImageInput) -> Tensor:
        """Images as float32 pixels, checked.

        Args:
            images: Images of the checkpoint's size, see the class.

        Returns:
            Shape ``(B, 1, H, W)``, in [0, 1].

        Raises:
            ValueError: If the images have another size, lie outside [0, 1] or hold NaN.
        """
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim not in (3, 4):
            raise ValueError(f"images must be (B, H, W), (B, H, W, C) or (B, C, H, W), got shape {tuple(images.shape)}")
        pixels = self.image_processor.preprocess(images)
        if pixels.is_complex():
            raise ValueError(f"images must be real, got {pixels.dtype}")
        pixels = pixels.float()
        if pixels.shape[1:] != (1, *self.image_size):
            raise ValueError(
                f"images must have one channel and {self.image_size} pixels, as this checkpoint's designs have, got "
                f"{pixels.shape[1]} channels and {tuple(pixels.shape[2:])} pixels"
            )
        if not ((pixels >= 0) & (pixels <= 1)).all():  # also false for NaN
            raise ValueError("images must lie in [0, 1] and hold no NaN")
        return pixels

    def check_scheduler(self) -> None:
        """Raises a ``ValueError`` if the denoiser was not trained for the scheduler."""
        _check_kind_of_scheduler(self.scheduler)
        trained, found = self.unet.config["_training_schedule"], _schedule_of(self.scheduler)
        name, config = type(self.scheduler).__name__, self.scheduler.config
        remedy = f"make it by {name}.from_config(pipe.scheduler.config)"
        if found["prediction_type"] != trained["prediction_type"]:
            raise ValueError(
                f"scheduler must have prediction_type={trained['prediction_type']!r}, as the denoiser was trained, "
                f"got {name} with {found['prediction_type']!r}; {remedy}"
            )
        same_length = found["num_train_timesteps"] == trained["num_train_timesteps"]
        if not same_length or not np.allclose(found["alphas_cumprod"], trained["alphas_cumprod"], rtol=0, atol=1e-6):
            raise ValueError(
                f"scheduler must have the noise schedule that the denoiser was trained with, got {name} with "
                f"another one ({config.get('beta_schedule')!r}); {remedy}"
            )

    def _checked_size(self, height: int | None, width: int | None, response: Any) -> tuple[int, int]:
        """Height and width of the images to generate."""
        for name, side in (("height", height), ("width", width)):
            if side is not None:
                _check_count(name, side, 1)
        size = (height or self.image_size[0], width or self.image_size[1])
        if response is not None and size != self.image_size:
            raise ValueError(
                f"height and width must be {self.image_size} with a response, which belongs to designs of that size, "
                f"got {size}"
            )
        return size

    def _checked_steps(
        self, num_inference_steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
    ) -> dict[str, Any]:
        """What the scheduler's ``set_timesteps`` is to be given."""
        given = {name: values for name, values in (("timesteps", timesteps), ("sigmas", sigmas)) if values is not None}
        if len(given) > 1:
            raise ValueError(f"timesteps or sigmas must be given, not both, got {timesteps!r} and {sigmas!r}")
        for name, values in given.items():
            if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"{name} must be None for {type(self.scheduler).__name__}, which takes none, got {values!r}"
                )
            _check_grid(name, values, len(self.scheduler.alphas_cumprod) if name == "timesteps" else math.inf)
            return {name: values}
        most = len(self.scheduler.alphas_cumprod)
        # between the timesteps of training only a grid in the log-SNR has room for more
        if num_inference_steps > most and self.scheduler.config.get("timestep_spacing") != "log_snr":
            raise ValueError(f"num_inference_steps must be at most the {most} of training, got {num_inference_steps}")
        return {"num_inference_steps": num_inference_steps}

    def _checked_step_kwargs(self, eta: float) -> dict[str, Any]:
        """What the scheduler's ``step`` is to be given beside the noise."""
        if "eta" in inspect.signature(self.scheduler.step).parameters:
            return {"eta": eta}
        if eta:
            raise ValueError(f"eta must be 0 for {type(self.scheduler).__name__}, whose step takes none, got {eta!r}")
        return {}

    def _most_likely_images(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """The most likely image of each of the latents: shape ``(B, C, H, W)``, in [0, 1]."""
        images = []
        for part in latents.to(self._execution_device, self.vae.dtype).split(_BATCH):
            codes = part / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
            # a logistic tail needs more digits than a half-precision decoder has
            decoded = decoder_output(self.vae, codes, size).float()
            images.append(most_likely_images(decoded, *decoder_meaning(self.vae)))
        return torch.cat(images)

    def _expected_images(self, latents: Tensor) -> Tensor:
        """The decoder's mean image of each of the latents, differentiable: shape ``(B, C, H, W)``, in [0, 1]."""
        codes = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        decoded = decoder_output(self.vae, codes)
        if self.decoder_likelihood == "bernoulli":
            return torch.sigmoid(decoded)
        return ((decoded + 1) / 2).clamp(0, 1)

    def _predicted(self, images: Tensor) -> Tensor:
        """Responses of images ``(B, 1, H, W)``, however many, in physical units."""
        batches = (batch.to(self._execution_device) for batch in images.split(_BATCH))
        return torch.cat([self.response_predictor.predict(batch) for batch in batches])

    def _best(self, images: Tensor, latents: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Of the candidates ``(B, *)`` for T targets, neighbours, those T with the nearest predicted response."""
        predicted = self._predicted(images).unflatten(0, (len(wanted), -1))
        best = self.response_predictor.response_error(predicted, wanted[:, None]).argmin(1)
        best = best + predicted.shape[1] * torch.arange(len(best), device=best.device)
        return images[best.to(images.device)], latents[best.to(latents.device)]

    def _refinement_begin(self) -> int:
        """From which of the scheduler's timesteps on a kept sample is denoised anew."""
        timesteps = self.scheduler.timesteps
        late = [i for i, t in enumerate(timesteps) if self._log_snr(t) >= _REFINEMENT_LOG_SNR]
        begin = late[0] if late else len(timesteps) - 1
        begin -= begin % self.scheduler.order  # where a solver of more stages begins a step
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return begin

    def _log_snr(self, timestep: Any) -> float:
        """Log-SNR of the scheduler at one timestep, fractional allowed."""
        if hasattr(self.scheduler, "curve"):  # of ours, which keeps the digits that alphas_cumprod loses near 1
            return float(self.scheduler.curve.at(float(timestep)))
        table = torch.logit(self.scheduler.alphas_cumprod.cpu().double(), eps=2**-24).numpy()
        return float(np.interp(float(timestep), np.arange(len(table)), table))

    def _guide_by_predictor(
        self, prediction: Tensor, noisy: Tensor, timestep: Any, wanted: Tensor, scale: float
    ) -> Tensor:
        r"""The denoiser's output ``(B, C, h, w)``, its :math:`\hat z_0` moved towards wanted responses."""
        log_snr = self._log_snr(timestep)
        if log_snr < _LEAST_LOG_SNR:
            return prediction
        alpha, sigma = math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))
        slope, offset = output_from_velocity(self.scheduler.config.prediction_type, alpha, sigma)
        clean = alpha * noisy - sigma * (prediction - offset * noisy) / slope
        means, targets = clean.to(self.vae.dtype).split(_BATCH), self.response_encoder.normalise(wanted).split(_BATCH)
        shift_of = self.response_predictor.posterior_mean_shift
        pairs = zip(means, targets, strict=True)
        shifts = torch.cat([shift_of(self._expected_images, mean, target, sigma**2) for mean, target in pairs])
        return prediction - (scale * slope / sigma * shifts).to(prediction)


def decoder_meaning(vae: Any) -> tuple[str, float | None]:
    """The likelihood of an autoencoder's decoder, and its scale, as its configuration has them."""
    return vae.config.get("_decoder_likelihood", "bernoulli"), vae.config.get("_decoder_scale")


def posterior_of(vae: Any, images: Tensor) -> Any:
    r"""The posterior :math:`q(z \mid x)` of images in [0, 1], shape ``(B, C, H, W)``, as diffusers' distribution."""
    height, width = (_factor(vae) * side for side in latent_size(vae))
    padded = pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]), mode="replicate")
    return vae.encode(2 * padded - 1).latent_dist


def decoder_output(vae: Any, codes: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    r"""The decoder's output for codes :math:`z`, shape ``(B, C, H, W)``, cropped to a size, by default the designs'."""
    height, width = size or _image_size(vae)
    return vae.decode(codes).sample[..., :height, :width]


def latent_size(vae: Any, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of the latents of an ``AutoencoderKL``: an image's size by its factor, rounded up."""
    height, width = size or _image_size(vae)
    return -(-height // _factor(vae)), -(-width // _factor(vae))


def _image_size(vae: Any) -> tuple[int, int]:
    size = vae.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _factor(vae: Any) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def decoder_log_prob(decoded: Tensor, images: Tensor, likelihood: str, scale: Tensor | float | None = None) -> Tensor:
    r"""Log-probability of every pixel of ``images`` under the decoder's output.

    Args:
        decoded: Output of the decoder network, shape ``(B, C, H, W)``.
        images: Pixel values in [0, 1], multiples of 1/255, shape ``(B, C, H, W)``; 0 or 1 for ``bernoulli``.
        likelihood: What the decoder's output means, see this module's text.
        scale: Scale of the logistic distribution on [0, 1]; ``discretized_logistic`` needs it.

    Returns:
        Log-probabilities in nats, shape ``(B, C, H, W)``.

    Raises:
        ValueError: If the likelihood is unknown, or a scale is missing.

    Example:
        >>> decoder_log_prob(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), "bernoulli")
        tensor([[[[-0.6931]]]])
    """
    if likelihood == "bernoulli":
        return logsigmoid(torch.where(images > 0.5, decoded, -decoded))
    if likelihood != "discretized_logistic":
        raise ValueError(f"likelihood must be one of {get_args(DecoderLikelihood)}, got {likelihood!r}")
    if scale is None:
        raise ValueError("scale must be a positive number for a discretized_logistic decoder, got None")
    scale = torch.as_tensor(scale, dtype=decoded.dtype, device=decoded.device)
    offset = images - (decoded + 1) / 2
    below = logsigmoid((offset + 0.5 / _LEVELS) / scale)  # log-mass of all values up to this bin
    above = logsigmoid((0.5 / _LEVELS - offset) / scale)  # log-mass of all values from this bin on
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)) keeps the digits that the difference loses
    inside = below + above + torch.log(-torch.expm1(-1 / (_LEVELS * scale)))
    half_bin = 0.5 / _LEVELS
    return torch.where(images < half_bin, below, torch.where(images > 1 - half_bin, above, inside))


def most_likely_images(decoded: Tensor, likelihood: str, scale: Tensor | float | None = None) -> Tensor:
    """The most likely image of a decoder's output: binary for ``bernoulli``, multiples of 1/255 otherwise.

    The open bins at 0 and 1 count in full, so that a background close to 0 comes out as exactly 0, which a response
    depends on.

    Args:
        decoded: Output of the decoder network, shape ``(B, C, H, W)``.
        likelihood: As in :func:`decoder_log_prob`.
        scale: Likewise.

    Returns:
        Images in [0, 1], same shape and dtype.
    """
    if likelihood == "bernoulli":
        return (decoded > 0).to(decoded.dtype)
    nearest = torch.round((decoded + 1) / 2 * _LEVELS).clamp(1, _LEVELS - 1) / _LEVELS  # best of the closed bins
    candidates = torch.stack([torch.zeros_like(decoded), nearest, torch.ones_like(decoded)])
    log_probs = torch.stack([decoder_log_prob(decoded, image, likelihood, scale) for image in candidates])
    return candidates.gather(0, log_probs.argmax(0, keepdim=True))[0]


def output_from_velocity(prediction_type: str, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    r"""The :math:`a, b` of a network's output :math:`a \hat v + b x_t`, where :math:`\hat v = \alpha \hat\epsilon -
    \sigma \hat x_0` (Salimans & Ho 2022, section 4).
    """
    return {
        "epsilon": (alpha, sigma),
        "v_prediction": (1.0, 0.0),
        "sample": (-sigma, alpha),
        "score": (-alpha / sigma, -1.0),
    }[prediction_type]


def record_training_schedule(unet: Any, scheduler: Any) -> None:
    """Writes down in a denoiser's configuration the noise schedule and prediction type that it is trained for."""
    unet.register_to_config(_training_schedule=_schedule_of(scheduler))


def _schedule_of(scheduler: Any) -> dict[str, Any]:
    alphas_cumprod = scheduler.alphas_cumprod.cpu().double().numpy()
    rows = np.linspace(0, len(alphas_cumprod) - 1, _RECORDED).round().astype(int)
    return {
        "prediction_type": scheduler.config.prediction_type,
        "num_train_timesteps": len(alphas_cumprod),
        "alphas_cumprod": alphas_cumprod[rows].tolist(),
    }


def _check_kind_of_scheduler(scheduler: Any) -> None:
    # by name, since those of ours that a checkpoint ships are other classes than the installed ones
    name = type(scheduler).__name__
    if not any(cls.__name__ in _SCHEDULERS for cls in type(scheduler).__mro__):
        raise ValueError(f"scheduler must be one of {', '.join(_SCHEDULERS)}, got {name}")
    for option, unfit in _UNFIT_SETTINGS.items():
        if scheduler.config.get(option) == unfit:
            raise ValueError(
                f"scheduler must neither clip nor follow another process, got {name} with {option}={unfit!r}; make it "
                f"by {name}.from_config(pipe.scheduler.config, ...) without that"
            )


def _check_parts(vae: Any, unet: Any, encoder: Any, predictor: Any) -> None:
    """Raises a ``ValueError`` that names the first part that does not fit the others."""
    likelihood, scale = decoder_meaning(vae)
    if likelihood not in get_args(DecoderLikelihood):
        raise ValueError(f"vae must have a _decoder_likelihood of {get_args(DecoderLikelihood)}, got {likelihood!r}")
    if likelihood == "bernoulli" and scale is not None:
        raise ValueError(f"vae must have no _decoder_scale with a bernoulli decoder, got {scale!r}")
    if likelihood == "discretized_logistic" and not (scale is not None and 0 < scale < math.inf):
        raise ValueError(f"vae must have a positive _decoder_scale with a discretized_logistic decoder, got {scale!r}")
    channels = (unet.config.in_channels, unet.config.out_channels)
    if channels != (vae.config.latent_channels,) * 2:
        raise ValueError(
            f"unet must have the {vae.config.latent_channels} channels of the vae's latents, got {channels[0]} in and "
            f"{channels[1]} out"
        )
    if encoder.config.token_dim != unet.config.cross_attention_dim:
        raise ValueError(
            f"response_encoder must make tokens of the unet's cross_attention_dim={unet.config.cross_attention_dim}, "
            f"got token_dim={encoder.config.token_dim}"
        )
    if predictor is not None:
        encoder.check_meaning("response_predictor.config.meaning", predictor.config.meaning)
        for name in ("scale", "mean", "std"):
            if not np.allclose(predictor.config[name], encoder.config[name], rtol=1e-6, atol=0):
                raise ValueError(
                    f"response_predictor must normalise responses as response_encoder does, got another {name}: "
                    f"{predictor.config[name]!r}, not {encoder.config[name]!r}"
                )


def _check_output_type(output_type: str, accepted: Sequence[str] = _OUTPUT_TYPES) -> None:
    if output_type not in accepted:
        raise ValueError(f"output_type must be one of {tuple(accepted)}, got {output_type!r}")


def _check_count(name: str, count: Any, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {count!r}")


def _check_number(name: str, value: Any, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= most or math.isinf(value):
        accepted = "be a non-negative number" if math.isinf(most) else "lie in [0, 1]"
        raise ValueError(f"{name} must {accepted}, got {value!r}")


def _check_grid(name: str, values: Any, end: float) -> None:
    try:
        grid = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        grid = np.empty(0)
    if grid.ndim != 1 or not grid.size or not ((np.diff(grid) < 0).all() and grid[-1] >= 0 and grid[0] < end):
        raise ValueError(f"{name} must fall strictly and lie in [0, {end}), got {values!r}")


def _guide(unconditional: Tensor, conditional: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance, with a share of its standard deviation brought back to the conditional one's."""
    guided = unconditional + scale * (conditional - unconditional)
    if not rescale:
        return guided
    entries = tuple(range(1, guided.ndim))
    spread = conditional.std(entries, keepdim=True) / guided.std(entries, keepdim=True)
    return torch.lerp(guided, guided * spread, rescale)


def _beside(kept: Tensor, candidates: Tensor) -> Tensor:
    """What is kept, each before its own candidates."""
    return torch.cat([kept[:, None], candidates.unflatten(0, (len(kept), -1))], dim=1).flatten(0, 1)


def _one_for_each(generator: torch.Generator | list[torch.Generator] | None, num: int) -> list[torch.Generator] | None:
    """A list of generators, one for each image, or ``None``."""
    if isinstance(generator, torch.Generator):
        return _spread(generator, num)
    one_each = isinstance(generator, list) and len(generator) == num
    if generator is not None and not (one_each and all(isinstance(each, torch.Generator) for each in generator)):
        got = [type(each).__name__ for each in generator] if isinstance(generator, list) else repr(generator)
        raise ValueError(f"generator must be one or a list of {num}, one an image, got {got}")
    return generator


def _spread(generator: torch.Generator, num: int) -> list[torch.Generator]:
    """One generator for each image, seeded from ``generator`` in order, so that a longer list starts as a shorter."""
    seeds = torch.randint(2**62, (num,), generator=generator, device=generator.device).tolist()
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]


def _likelihood_package() -> Any:
    try:
        return importlib.import_module("mechdiffusers.likelihood")
    except ImportError as error:
        raise ImportError("likelihoods and interpolation need the package: pip install mechdiffusers") from error
