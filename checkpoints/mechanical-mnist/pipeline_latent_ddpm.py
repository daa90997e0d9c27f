r"""Latent diffusion of microstructures: generate, encode, decode, interpolate.

A design :math:`x` has latents :math:`z_0 = s (z - m)`, where :math:`z` is the autoencoder's code and the shift
:math:`m` and scale :math:`s` are those measured on the training data (``shift_factor`` and ``scaling_factor`` of the
autoencoder). A variance-preserving diffusion :math:`z_t = \alpha_t z_0 + \sigma_t \epsilon` of them is reversed by a
denoiser (Rombach et al. 2022, section 3; Luo 2022, "Variational Diffusion Models").

This file travels inside checkpoints: it imports torch, numpy, diffusers and its siblings alone.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, ImagePipelineOutput, UNet2DConditionModel
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .continuous_diffusion import ContinuousTime
from .hub_checkpoint import HubCheckpoint
from .latent_likelihood import (
    AutoencoderLikelihood,
    check_decoder_likelihood,
    image_size,
    latent_size,
    posterior_of,
)
from .latent_prior import LatentPrior
from .portable_checkpoint import PortableCheckpoint
from .predictor_guidance import PredictorGuidance
from .probability_flow import ProbabilityFlow
from .response_conditioning import Guidance, check_meaning, check_number, prepare_response
from .trained_noise_schedule import TrainedNoiseSchedule
from .variational_likelihood import VariationalLikelihood

__all__ = ["LatentDDPMPipeline"]

_OUTPUT_TYPES = ("pil", "np", "pt")


class LatentDDPMPipeline(
    VariationalLikelihood,
    LatentPrior,
    PredictorGuidance,
    ProbabilityFlow,
    ContinuousTime,
    AutoencoderLikelihood,
    TrainedNoiseSchedule,
    HubCheckpoint,
    PortableCheckpoint,
):
    r"""Generates microstructures with a diffusion model of an autoencoder's latents.

    Images are single-channel, in [0, 1]: PIL images, numpy ``(B, H, W, C)``, torch ``(B, C, H, W)``, or designs
    ``(B, H, W)`` of either kind. 0 is the soft phase, 1 the stiff one.

    Args:
        vae ([`AutoencoderKL`]):
            Autoencoder; ``sample_size`` in its configuration is the size of the designs, which need not be a multiple
            of its factor: they are padded and cropped.
        unet ([`UNet2DConditionModel`]):
            Denoiser of the latents; attends to the tokens of ``response_encoder``.
        scheduler ([`SchedulerMixin`]):
            A variance-preserving scheduler with the betas and prediction type that the denoiser was trained with.
        response_encoder ([`ResponseEncoder`]):
            Makes tokens of responses, and the null tokens of a sample without one.
        decoder_likelihood (`str`, defaults to `"bernoulli"`):
            What the decoder's output means: ``"bernoulli"`` or ``"discretized_logistic"``.
        decoder_scale (`float`, *optional*):
            Scale of a ``discretized_logistic`` decoder, on [0, 1].
        response_predictor ([`ResponsePredictor`], *optional*):
            Predicts the response of a design, to draw samples towards a wanted one.

    Raises:
        ValueError: If the parts do not fit together or the scheduler does not suit a latent model.

    Example:
        >>> pipe = LatentDDPMPipeline.from_pretrained("checkpoints/composites-32")  # doctest: +SKIP
        >>> images = pipe(batch_size=4, generator=torch.manual_seed(0)).images  # doctest: +SKIP

    References:
        | High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022)
        | https://arxiv.org/abs/2112.10752
    """

    # the predictor stands outside the chain, in which it would send the decoder away that its gradient goes through
    model_cpu_offload_seq = "response_encoder->unet->vae"
    _optional_components: ClassVar = ["response_predictor"]

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: Any,
        response_encoder: Any,
        decoder_likelihood: str = "bernoulli",
        decoder_scale: float | None = None,
        response_predictor: Any = None,
    ):
        super().__init__()
        check_decoder_likelihood(decoder_likelihood, decoder_scale)
        if response_predictor is not None:
            check_meaning("response_predictor.config.meaning", response_predictor.config.meaning, response_encoder)
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            response_encoder=response_encoder,
            response_predictor=response_predictor,
        )
        self.register_to_config(decoder_likelihood=decoder_likelihood, decoder_scale=decoder_scale)
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_grayscale=True)
        self._take_as_trained_with(scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        response: Tensor | np.ndarray | None = None,
        num_images_per_response: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
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
            batch_size (`int`, defaults to 1):
                Number of images without a ``response``.
            response (`torch.Tensor` or `np.ndarray`, *optional*):
                Wanted responses, shape ``(B, L, S)``, NaN where open. What the entries are, their load cases, strains,
                quantity and units, is what ``response_encoder.config.meaning`` says.
            num_images_per_response (`int`, defaults to 1):
                Images for each response; the images of one response are neighbours.
            num_inference_steps (`int`, defaults to 50):
                Number of denoising steps.
            guidance_scale (`float`, defaults to 1.0):
                Weight of classifier-free guidance as in equation 2 of the Imagen paper (Saharia et al. 2022); 1 is
                none. It acts only with a ``response``.
            generator (`torch.Generator` or a list of them, *optional*):
                Source of all random numbers. A list has one for each image. A single one is spread to one for each
                image first, so that image ``i`` does not depend on how many images follow.
            latents (`torch.Tensor`, *optional*):
                Gaussian noise to start from, shape ``(images, C, h, w)``, the candidates of an image being neighbours.
            output_type (`str`, defaults to `"pil"`):
                ``"pil"``, ``"np"`` (B, H, W, C) or ``"pt"`` (B, C, H, W).
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as ``callback_on_step_end(pipe, step, timestep, {"latents": latents})`` after every step; what
                it returns under ``"latents"`` replaces the latents. A refinement goes through its steps again.
            guidance_rescale (`float`, defaults to 0.0):
                How much of the guided prediction's spread is brought back to the conditional one's, in [0, 1], as in
                section 3.4 of Lin et al. (2024).
            guidance_start (`float`, defaults to 0.0):
                Fraction of the steps after which guidance starts.
            guidance_stop (`float`, defaults to 1.0):
                Fraction of the steps after which guidance stops; outside, the response acts without guidance.
            predictor_guidance_scale (`float`, defaults to 4.0):
                Weight of the guidance by the checkpoint's ``response_predictor``; 0 is none. By the formula it is 1; 4
                came nearer to the targets, as the denoiser takes a part of the move back. It acts only with a
                ``response`` and a checkpoint that has a predictor.
            num_candidates (`int`, defaults to 1):
                How many to draw for each image that is returned: the one whose predicted response is nearest. More than
                one needs a ``response`` and a checkpoint that has a predictor.
            num_refinements (`int`, defaults to 0):
                How often the last steps are taken again from what was kept, with new noise for as many candidates; the
                nearest of these and the image itself is kept. It needs what ``num_candidates`` needs.
            meaning (`dict`, *optional*):
                What the entries of ``response`` mean, as ``mechdiffusers.response_meaning`` reads it from a dataset.
                Numbers do not tell, so that without it only their shape is compared with the checkpoint's.

        Returns:
            [`ImagePipelineOutput`], or a tuple of the images.

        Raises:
            ValueError: If an argument is out of range or does not fit the checkpoint, or the scheduler does not suit.
        """
        self._check_scheduler()
        _check_output_type(output_type)
        for name, count, least in (
            ("batch_size", batch_size, 1),
            ("num_images_per_response", num_images_per_response, 1),
            ("num_inference_steps", num_inference_steps, 1),
            ("num_candidates", num_candidates, 1),
            ("num_refinements", num_refinements, 0),
        ):
            if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {count!r}")
        most = len(self.scheduler.alphas_cumprod)
        # between the timesteps of training only a grid in the log-SNR has room for more
        if num_inference_steps > most and self.scheduler.config.get("timestep_spacing") != "log_snr":
            raise ValueError(f"num_inference_steps must be at most the {most} of training, got {num_inference_steps}")
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_start, guidance_stop)
        check_number("predictor_guidance_scale", predictor_guidance_scale)
        if not 0 <= predictor_guidance_scale < math.inf:
            raise ValueError(
                f"predictor_guidance_scale must be a non-negative number, got {predictor_guidance_scale!r}"
            )
        predicts = response is not None and self.response_predictor is not None
        for name, count, none in (("num_candidates", num_candidates, 1), ("num_refinements", num_refinements, 0)):
            if count != none and not predicts:
                raise ValueError(
                    f"{name} must be {none} without a response or without a response_predictor to choose by, "
                    f"got {count}"
                )
        device, dtype = self._execution_device, self.unet.dtype

        responses = prepare_response(response, batch_size, self.response_encoder)
        if meaning is not None:
            check_meaning("meaning", meaning, self.response_encoder)
        responses = responses.repeat_interleave(num_images_per_response, dim=0)
        num_images = len(responses)
        if isinstance(generator, torch.Generator):
            generator = _spread(generator, num_images)
        one_each = isinstance(generator, list) and len(generator) == num_images
        if generator is not None and not (one_each and all(isinstance(each, torch.Generator) for each in generator)):
            got = [type(each).__name__ for each in generator] if isinstance(generator, list) else repr(generator)
            raise ValueError(f"generator must be one or a list of {num_images}, one an image, got {got}")
        if num_candidates > 1:
            responses = responses.repeat_interleave(num_candidates, dim=0)
            num_images *= num_candidates
            if generator is not None:
                generator = [each for one in generator for each in _spread(one, num_candidates)]
        shape = (num_images, self.unet.config.in_channels, *latent_size(self.vae))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif not isinstance(latents, Tensor) or latents.shape != shape:
            kind = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents must be a tensor of shape {shape}, got {kind}")
        elif not latents.isfinite().all():
            raise ValueError("latents must be finite, got NaN or an infinite one")

        responses = responses.to(device)
        tokens = self.response_encoder(responses)
        open_tokens = self.response_encoder(torch.full_like(responses, math.nan))

        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}

        def denoise(latents: Tensor, begin: int = 0) -> Tensor:
            timesteps = self.scheduler.timesteps[begin:]
            for i, t in enumerate(self.progress_bar(timesteps), begin):
                model_input = self.scheduler.scale_model_input(latents, t)
                if response is not None and guidance.acts_at(i, len(self.scheduler.timesteps)):
                    both = torch.cat([open_tokens, tokens])
                    prediction = self.unet(torch.cat([model_input] * 2), t, encoder_hidden_states=both).sample
                    prediction = guidance(*prediction.chunk(2))
                else:
                    prediction = self.unet(model_input, t, encoder_hidden_states=tokens).sample
                if predicts and predictor_guidance_scale:
                    prediction = self._drawn_towards(prediction, model_input, t, responses, predictor_guidance_scale)
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs).prev_sample.to(dtype)
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, i, t, {"latents": latents}).get("latents", latents)
            return latents

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = denoise(latents.to(device, dtype) * self.scheduler.init_noise_sigma)
        images = self._most_likely_images(latents)
        if num_candidates > 1:
            images, latents = self._nearest(images, latents, responses[::num_candidates])
        for _ in range(num_refinements):
            self.scheduler.set_timesteps(num_inference_steps, device=device)  # forgets the steps before
            begin = self._refinement_begin()
            noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            variants = latents.repeat_interleave(num_candidates, dim=0)
            start = self.scheduler.timesteps[begin].expand(len(variants))
            variants = denoise(self.scheduler.add_noise(variants, noise, start).to(dtype), begin)
            images, latents = self._nearest(
                _joined(images, self._most_likely_images(variants)),
                _joined(latents, variants),
                responses[::num_candidates],
            )
        images = self.image_processor.postprocess(images, output_type=output_type)
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
            ValueError: If the images have another size, lie outside [0, 1] or hold NaN.
        """
        pixels = self._prepare_images(images)
        posterior = posterior_of(self.vae, pixels.to(self._execution_device, self.vae.dtype))
        if isinstance(generator, torch.Generator):
            generator = _spread(generator, len(pixels))
        codes = posterior.mean
        if sample_posterior:
            codes = codes + posterior.std * randn_tensor(
                codes.shape, generator=generator, device=codes.device, dtype=codes.dtype
            )
        return (codes - self._shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pt") -> Any:
        """The most likely image of each of the latents: binary, or multiples of 1/255, as the decoder's likelihood is.

        Args:
            latents: Shape ``(B, C, h, w)``, as :meth:`encode` gives them.
            output_type: ``"pt"`` (B, C, H, W), ``"np"`` (B, H, W, C) or ``"pil"``.

        Returns:
            Images in [0, 1].

        Raises:
            ValueError: If the latents have another shape, or ``output_type`` is unknown.
        """
        _check_output_type(output_type)
        shape = self._latent_shape
        if latents.ndim != 4 or latents.shape[1:] != shape:
            raise ValueError(f"latents must have shape (B, {', '.join(map(str, shape))}), got {tuple(latents.shape)}")
        return self.image_processor.postprocess(self._most_likely_images(latents), output_type=output_type)

    def interpolate(self, a: PipelineImageInput, b: PipelineImageInput, num: int = 8, output_type: str = "pil") -> Any:
        """Images along the straight line between the latents of two images.

        Args:
            a: The image to start from, one, see the class for its kinds.
            b: The image to end at.
            num: Number of images, both ends included, at least 2.
            output_type: ``"pil"``, ``"np"`` (num, H, W, C) or ``"pt"`` (num, C, H, W).

        Returns:
            ``num`` images.

        Raises:
            ValueError: If ``num`` is below 2, or ``a`` or ``b`` is not one image of the checkpoint's size.

        References:
            | Deep generative modeling for mechanistic-based learning and design of metamaterial systems (Wang et al.,
              2020), on paths through the latent space
            | https://arxiv.org/abs/2006.15274
        """
        if not isinstance(num, int) or num < 2:
            raise ValueError(f"num must be an integer of at least 2, got {num!r}")
        ends = []
        for name, image in (("a", a), ("b", b)):
            end = self.encode(image)
            if len(end) != 1:
                raise ValueError(f"{name} must be one image, got {len(end)}")
            ends.append(end)
        weights = torch.linspace(0, 1, num, dtype=ends[0].dtype, device=ends[0].device)[:, None, None, None]
        return self.decode(torch.lerp(ends[0], ends[1], weights), output_type=output_type)

    def _prepare_images(self, images: PipelineImageInput) -> Tensor:
        """Images as float32 pixels (B, 1, H, W) in [0, 1], checked."""
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim not in (3, 4):
            raise ValueError(f"images must be (B, H, W), (B, H, W, C) or (B, C, H, W), got shape {tuple(images.shape)}")
        pixels = self.image_processor.preprocess(images)
        if pixels.is_complex():
            raise ValueError(f"images must be real, got {pixels.dtype}")
        pixels = pixels.float()
        if pixels.shape[1:] != (1, *image_size(self.vae)):
            raise ValueError(
                f"images must have one channel and {image_size(self.vae)} pixels, as this checkpoint's designs have, "
                f"got {pixels.shape[1]} channels and {tuple(pixels.shape[2:])} pixels"
            )
        if not ((pixels >= 0) & (pixels <= 1)).all():  # also false for NaN
            raise ValueError("images must lie in [0, 1] and hold no NaN")
        return pixels

    def _response_tokens(self, response: Tensor | np.ndarray | None, num: int) -> Tensor:
        """What the denoiser attends to, for ``num`` samples."""
        wanted = prepare_response(response, num if response is None else 1, self.response_encoder)
        if len(wanted) != num:
            raise ValueError(f"response must be one for each of {num} samples, got {len(wanted)}")
        return self.response_encoder(wanted.to(self._execution_device))


def _check_output_type(output_type: str) -> None:
    if output_type not in _OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {_OUTPUT_TYPES}, got {output_type!r}")


def _joined(kept: Tensor, candidates: Tensor) -> Tensor:
    """What is kept, each before its own candidates."""
    return torch.cat([kept[:, None], candidates.unflatten(0, (len(kept), -1))], dim=1).flatten(0, 1)


def _spread(generator: torch.Generator, num: int) -> list[torch.Generator]:
    """One generator for each image, seeded from ``generator`` in order, so that a longer list starts as a shorter."""
    seeds = torch.randint(2**62, (num,), generator=generator, device=generator.device).tolist()
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]
