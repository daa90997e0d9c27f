r"""Latent diffusion of microstructures: generate, invert a response, encode, decode.

A design :math:`x` has latents :math:`z_0 = s (z - m)`, where :math:`z` is the autoencoder's code and the shift
:math:`m` and scale :math:`s` are measured on the training data (``shift_factor`` and ``scaling_factor`` of the
autoencoder). A denoiser reverses their variance-preserving diffusion :math:`z_t = \alpha_t z_0 + \sigma_t \epsilon`
(Rombach et al. 2022, section 3; Luo 2022, "Variational Diffusion Models").

The autoencoder is a latent-variable model, whose decoder is a probability mass function of the pixels:

``bernoulli``
    Binary designs. The network's output is the logit that a pixel is stiff.
``discretized_logistic``
    8-bit images. The network's output, mapped from [-1, 1] to [0, 1] as in diffusers, is the mean of a logistic
    distribution with one common ``scale``. A pixel value has the mass of its bin of width 1/255. The bins at 0 and 1
    extend to infinity: the 256 masses sum to 1 (Salimans et al. 2017, section 2.1).

This file travels inside checkpoints: it imports torch, numpy, diffusers and its sibling alone.
"""

import importlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines import ImagePipelineOutput
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
Generators = torch.Generator | list[torch.Generator] | None

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_LEVELS = 255
_BATCH = 64  #: Most images that go through a network at once.
#: Solvers of the variance-preserving diffusion.
_SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("PNDMScheduler", "UniPCMultistepScheduler"),
    *("PredictorCorrectorScheduler", "ProbabilityFlowScheduler", "VDMScheduler"),
)
#: Settings with which these, too, would sample something else, and what they must be.
_FIT_SETTINGS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("clip_sample", "thresholding", "use_flow_sigmas"), lambda value: not value),
    **dict.fromkeys(("sigma_min", "sigma_max"), lambda value: value is None),
    "timestep_type": lambda value: value != "continuous",
    "interpolation_type": lambda value: value != "log_linear",
    "variance_type": lambda value: value not in ("learned", "learned_range"),
    "lambda_min_clipped": lambda value: float(value) == -math.inf,
}
_RECORDED = 21  #: Timesteps at which a training's schedule is recorded.
_LEAST_LOG_SNR = -2.5  #: Below it, the image of :math:`\hat z_0` tells a predictor nothing.
_REFINEMENT_LOG_SNR = 1.0  #: The best sample is re-noised to this: a few per cent of the pixels change.


class LatentDDPMPipeline(PortableCheckpoint, DiffusionPipeline):
    r"""Generates microstructures with a diffusion model of an autoencoder's latents.

    Images are single-channel, in [0, 1]: PIL images, numpy ``(B, H, W, C)``, torch ``(B, C, H, W)``, or designs
    ``(B, H, W)`` of either kind. 0 is the soft phase, 1 the stiff one.

    Args:
        vae: Autoencoder. ``sample_size`` in its configuration is the size of the designs, which are padded to a
            multiple of its factor and cropped again. ``_decoder_likelihood`` says what the decoder's output means
            (``"bernoulli"`` where it is missing), ``_decoder_scale`` is the scale of a ``"discretized_logistic"`` one.
        unet: Denoiser of the latents; attends to the tokens of ``response_encoder``. ``_training_schedule`` in its
            configuration is what it was trained for; where it is missing, that of ``scheduler`` is recorded there.
        scheduler: Variance-preserving, with the betas and prediction type that the denoiser was trained with.
        response_encoder: Makes tokens of responses, and the null tokens of a sample without one.
        response_predictor: Predicts the response of a design, to guide samples towards a wanted one (see its module).

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
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_modules(response_encoder=response_encoder, response_predictor=response_predictor)
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
        if "decoder_likelihood" in index:  # an argument of the pipeline in the earlier layout
            self.vae.register_to_config(**{f"_{name}": index[name] for name in ("decoder_likelihood", "decoder_scale")})

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
        generator: Generators = None,
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
        spec: Any = None,
    ) -> ImagePipelineOutput | tuple:
        r"""Generates images: an [`ImagePipelineOutput`], or a tuple of them.

        Args:
            response: Wanted responses, shape ``(B, L, S)``, NaN where unspecified; ``response_encoder.config.spec``
                has their load cases, strains, quantity and units.
            batch_size: Number of images without a ``response``.
            num_images_per_response: Images for each response; the images of one response are neighbours.
            height: Height in pixels, by default that of the checkpoint's designs; a ``response`` allows no other.
            width: Width in pixels, likewise.
            num_inference_steps: Number of denoising steps.
            timesteps: The steps themselves, for schedulers whose ``set_timesteps`` takes them.
            sigmas: The noise levels of the steps, likewise.
            guidance_scale: Weight :math:`w` of classifier-free guidance :math:`u + w (c - u)` from the prediction
                without to the one with a ``response`` (Imagen, Saharia et al. 2022, equation 2); 1 is none.
            eta: Share of the noise of DDIM's steps, for schedulers whose ``step`` takes it.
            generator: Source of all random numbers; a list has one for each image. A single one first seeds one for
                each image, so image ``i`` does not depend on how many images follow.
            latents: Gaussian noise to start from, shape ``(images, C, h, w)``; candidates of an image are neighbours.
            output_type: ``"pil"``, ``"np"`` (B, H, W, C), ``"pt"`` (B, C, H, W) or ``"latent"`` (B, C, h, w).
            return_dict: Whether to return an [`ImagePipelineOutput`], not a tuple.
            callback_on_step_end: Function, [`PipelineCallback`] or [`MultiPipelineCallbacks`], called after every step,
                refinements' too, as ``callback(pipe, step, timestep, tensors)``; tensors that it returns replace these.
            callback_on_step_end_tensor_inputs: Tensors for a function: ``"latents"``, and the tokens of the responses
                as ``"prompt_embeds"``, the name in stock callbacks. While guidance acts, the null tokens come first.
            guidance_rescale: Share of the guided prediction's standard deviation that is brought back to the
                conditional one's, in [0, 1] (Lin et al. 2024, section 3.4).
            guidance_start: Fraction of the steps after which guidance starts (Kynkäänniemi et al. 2024).
            guidance_stop: Fraction of the steps after which it stops; outside, the conditional prediction stands alone.
            predictor_guidance_scale: Weight of the guidance by ``response_predictor`` towards a ``response``; 0 is
                none, 1 is the theoretical weight. 4 gave the lowest error in our benchmark.
            num_candidates: Images drawn for each one that is returned, the best by predicted response. More than one
                needs a ``response`` and a predictor.
            num_refinements: Number of SDEdit rounds (Meng et al. 2022): re-noise the best image to log-SNR 1, denoise
                ``num_candidates`` variants, keep the best by predicted response. It needs what candidates need.
            spec: The ``ResponseSpec`` of ``response``, which must be that of the checkpoint. Without it only the shape
                of a response is compared.

        Raises:
            ValueError: If an argument is out of range or does not fit the checkpoint, or the scheduler does not suit.
        """
        self.check_scheduler()
        check_choice("output_type", output_type, _OUTPUT_TYPES)
        size = (self.image_size[0] if height is None else height, self.image_size[1] if width is None else width)
        counts = {"batch_size": batch_size, "num_images_per_response": num_images_per_response}
        counts |= {"num_inference_steps": num_inference_steps, "num_candidates": num_candidates}
        counts |= {"height": size[0], "width": size[1]}
        for name, count in counts.items():
            check_count(name, count)
        check_count("num_refinements", num_refinements, least=0)
        scales = {"guidance_scale": guidance_scale, "predictor_guidance_scale": predictor_guidance_scale}
        for name, scale in scales.items():
            check_number(name, scale)
        shares = {"guidance_rescale": guidance_rescale, "guidance_start": guidance_start}
        for name, share in {**shares, "guidance_stop": guidance_stop, "eta": eta}.items():
            check_number(name, share, most=1)
        if guidance_start > guidance_stop:
            raise ValueError(f"guidance_start must be at most guidance_stop={guidance_stop!r}, got {guidance_start!r}")
        if response is not None and size != self.image_size:
            accepted = f"{self.image_size} with a response, which belongs to designs of that size"
            raise ValueError(f"height and width must be {accepted}, got {size}")
        steps = self._checked_steps(num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        step_options = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in step_options:
            raise ValueError(f"eta must be 0 for {type(self.scheduler).__name__}, whose step takes none, got {eta!r}")
        predicts = response is not None and self.response_predictor is not None
        for name, count, none in (("num_candidates", num_candidates, 1), ("num_refinements", num_refinements, 0)):
            if count != none and not predicts:
                missing = "a response or without a response_predictor to choose by"
                raise ValueError(f"{name} must be {none} without {missing}, got {count}")
        kinds = [cls.__name__ for cls in type(self.scheduler).__mro__]
        runs_up = "PNDMScheduler" in kinds and not self.scheduler.config.skip_prk_steps
        if num_refinements and (runs_up or "LMSDiscreteScheduler" in kinds):
            accepted = "0 with LMSDiscreteScheduler and PNDMScheduler's Runge-Kutta steps, which cannot begin midway"
            raise ValueError(f"num_refinements must be {accepted}, got {num_refinements} with {kinds[0]}")
        if not (callback_on_step_end is None or callable(callback_on_step_end)):
            raise ValueError(f"callback_on_step_end must be a function or None, got {callback_on_step_end!r}")
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]:
            known = self._callback_tensor_inputs
            raise ValueError(f"callback_on_step_end_tensor_inputs must be among {known}, got {unknown}")
        device, dtype = self._execution_device, self.unet.dtype

        responses = self.response_encoder.prepare(response, batch_size)
        if spec is not None:
            self.response_encoder.check_spec(spec)
        responses = wanted = responses.repeat_interleave(num_images_per_response, dim=0).to(device)
        generator = one_for_each(generator, len(wanted))
        if num_candidates > 1:
            responses = responses.repeat_interleave(num_candidates, dim=0)
            if generator is not None:
                generator = [each for one in generator for each in spread(one, num_candidates)]
        num_images = len(responses)
        shape = (num_images, self.unet.config.in_channels, *latent_size(self.vae, size))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif not isinstance(latents, Tensor) or latents.shape != shape:
            kind = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents must be a tensor of shape {shape}, got {kind}")
        elif not latents.isfinite().all():
            raise ValueError("latents must be finite, got NaN or an infinite one")

        tokens = self.response_encoder(responses)
        if response is not None and guidance_scale != 1:
            tokens = torch.cat([self.response_encoder(torch.full_like(responses, math.nan)), tokens])
        step_kwargs = {"eta": eta, "generator": generator}
        step_kwargs = {name: value for name, value in step_kwargs.items() if name in step_options}
        self._interrupt, self._guidance_scale = False, guidance_scale
        prompt_embeds = tokens  # what a callback does to them and to the scale holds for the refinements too

        def denoise(latents: Tensor, begin: int = 0) -> Tensor:
            nonlocal prompt_embeds
            num_steps = self._num_timesteps = len(self.scheduler.timesteps)
            guided = range(int(guidance_start * num_steps), int(guidance_stop * num_steps))
            for i, t in enumerate(self.progress_bar(self.scheduler.timesteps[begin:]), begin):
                if self.interrupt:
                    continue
                noisy = self.scheduler.scale_model_input(latents, t)
                acts = len(prompt_embeds) > num_images and self._guidance_scale != 1 and i in guided
                batch, embeds = (
                    (torch.cat([noisy] * 2), prompt_embeds) if acts else (noisy, prompt_embeds[-num_images:])
                )
                prediction = self.unet(batch, t, encoder_hidden_states=embeds).sample
                if acts:
                    prediction = _guide(prediction, self._guidance_scale, guidance_rescale)
                if predicts and predictor_guidance_scale:
                    prediction = self._guide_by_predictor(prediction, noisy, t, responses, predictor_guidance_scale)
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
        if output_type != "latent" or num_candidates > 1 or num_refinements:
            images = self._most_likely_images(latents, size)
        if num_candidates > 1:
            images, latents = self._best(images, latents, wanted)
        for _ in range(num_refinements):
            self.scheduler.set_timesteps(**steps, device=device)  # forgets the steps before
            begin = self._refinement_begin()
            noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            variants = latents.repeat_interleave(num_candidates, dim=0)
            start = self.scheduler.timesteps[begin].expand(len(variants))
            variants = denoise(self.scheduler.add_noise(variants, noise, start).to(dtype), begin)
            if self.interrupt:  # they are unfinished
                break
            refined = _beside(images, self._most_likely_images(variants, size))
            images, latents = self._best(refined, _beside(latents, variants), wanted)
        images = latents if output_type == "latent" else self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode(
        self, images: PipelineImageInput, sample_posterior: bool = False, generator: Generators = None
    ) -> Tensor:
        """Latents of images, shape ``(B, C, h, w)``, scaled as the denoiser sees them.

        Args:
            images: As in :meth:`prepare_images`.
            sample_posterior: Whether to draw from the posterior instead of taking its mean.
            generator: Source of the draws; a list has one for each image.

        Raises a ``ValueError`` as in :meth:`prepare_images`, or if a list of generators has another length.
        """
        pixels = self.prepare_images(images)
        generator = one_for_each(generator, len(pixels))
        parts = pixels.to(self._execution_device, self.vae.dtype).split(_BATCH)
        posteriors = [posterior_of(self.vae, part) for part in parts]
        codes = torch.cat([posterior.mean for posterior in posteriors])
        if sample_posterior:
            noise = randn_tensor(codes.shape, generator=generator, device=codes.device, dtype=codes.dtype)
            codes = codes + torch.cat([posterior.std for posterior in posteriors]) * noise
        return (codes - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pt") -> Any:
        """The most likely image of each of the latents, in [0, 1]: see :func:`most_likely_images`.

        Args:
            latents: Shape ``(B, C, h, w)``, as from :meth:`encode`. Latents of another height or width give images of
                their size times the autoencoder's factor.
            output_type: ``"pt"`` (B, C, H, W), ``"np"`` (B, H, W, C) or ``"pil"``.

        Raises a ``ValueError`` if the latents have another shape, or ``output_type`` is unknown.
        """
        check_choice("output_type", output_type, _OUTPUT_TYPES[:3])
        channels = self.vae.config.latent_channels
        latents = torch.as_tensor(latents)
        if latents.ndim != 4 or latents.shape[1] != channels or not latents.numel():
            raise ValueError(f"latents must have shape (B, {channels}, h, w), got {tuple(latents.shape)}")
        if not latents.isfinite().all():
            raise ValueError("latents must be finite, got NaN or an infinite one")
        height, width = (_factor(self.vae) * side for side in latents.shape[2:])
        size = self.image_size if latents.shape[1:] == self.latent_shape else (height, width)
        return self.image_processor.postprocess(self._most_likely_images(latents, size), output_type)

    @torch.no_grad()
    def predict_response(self, images: PipelineImageInput) -> Tensor:
        """The response of images without a simulation, shape ``(B, L, S)``, float32, in the checkpoint's units.

        Raises a ``ValueError`` if the checkpoint has no predictor, or as in :meth:`prepare_images`.

        Example:
            >>> pipe.predict_response(images)  # doctest: +SKIP
        """
        if self.response_predictor is None:
            raise ValueError("response_predictor must be part of the checkpoint to predict a response, got none")
        batches = self.prepare_images(images).split(_BATCH)
        return torch.cat([self.response_predictor.predict(batch.to(self._execution_device)) for batch in batches])

    def log_likelihood(self, images: PipelineImageInput, **options: Any) -> Any:
        """The evidence lower bound of images: ``elbo(images, **options)`` of ``likelihood.LatentLikelihood(pipe)``.

        Raises an ``ImportError`` if mechdiffusers is not installed.

        Example:
            >>> pipe.log_likelihood(designs).bits_per_dim.mean()  # doctest: +SKIP
        """
        return _likelihood_package().LatentLikelihood(self).elbo(images, **options)

    def interpolate(self, a: PipelineImageInput, b: PipelineImageInput, num: int = 8, output_type: str = "pil") -> Any:
        """Images between two images, by way of noise: see ``mechdiffusers.likelihood.LatentDiffusion``.

        Args:
            a: The one image to start from, as in :meth:`prepare_images`.
            b: The one image to end at.
            num: Number of images, both ends included, at least 2.
            output_type: As in :meth:`decode`.

        Raises an ``ImportError`` if mechdiffusers is not installed, and a ``ValueError`` if ``num`` is below 2, or an
        end is not one image of the checkpoint's size.
        """
        check_choice("output_type", output_type, _OUTPUT_TYPES[:3])
        diffusion, ends = _likelihood_package().LatentDiffusion(self), {"a": self.encode(a), "b": self.encode(b)}
        for name, end in ends.items():
            if len(end) != 1:
                raise ValueError(f"{name} must be one image, got {len(end)}")
        return self.decode(diffusion.interpolate(**ends, num=num).to(ends["a"]), output_type)

    def prepare_images(self, images: PipelineImageInput) -> Tensor:
        """Images, of any kind that the class names, as float32 pixels in [0, 1], shape ``(B, 1, H, W)``.

        Raises a ``ValueError`` if the images have another size than the checkpoint's, lie outside [0, 1] or hold NaN.
        """
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim not in (3, 4):
            raise ValueError(f"images must be (B, H, W), (B, H, W, C) or (B, C, H, W), got shape {tuple(images.shape)}")
        if not len(images if hasattr(images, "__len__") else [images]):
            raise ValueError("images must be at least one, got none")
        pixels = self.image_processor.preprocess(images)
        if pixels.is_complex():
            raise ValueError(f"images must be real, got {pixels.dtype}")
        if pixels.shape[1:] != (1, *self.image_size):
            accepted = f"one channel and {self.image_size} pixels, as this checkpoint's designs have"
            got = f"{pixels.shape[1]} channels and {tuple(pixels.shape[2:])} pixels"
            raise ValueError(f"images must have {accepted}, got {got}")
        if not ((pixels >= 0) & (pixels <= 1)).all():  # also false for NaN
            raise ValueError("images must lie in [0, 1] and hold no NaN")
        return pixels.float()

    def check_scheduler(self) -> None:
        """Raises a ``ValueError`` if the denoiser was not trained for the scheduler."""
        _check_kind_of_scheduler(self.scheduler)
        trained, found = self.unet.config["_training_schedule"], _schedule_of(self.scheduler)
        name = type(self.scheduler).__name__
        remedy = f"make it by {name}.from_config(pipe.scheduler.config)"
        if found["prediction_type"] != trained["prediction_type"]:
            accepted = f"prediction_type={trained['prediction_type']!r}, as the denoiser was trained"
            raise ValueError(f"scheduler must have {accepted}, got {name} with {found['prediction_type']!r}; {remedy}")
        same_length = found["num_train_timesteps"] == trained["num_train_timesteps"]
        if not same_length or not np.allclose(found["alphas_cumprod"], trained["alphas_cumprod"], rtol=0, atol=1e-6):
            accepted = "the noise schedule that the denoiser was trained with"
            got = f"{name} with another one ({self.scheduler.config.get('beta_schedule')!r})"
            raise ValueError(f"scheduler must have {accepted}, got {got}; {remedy}")

    def _checked_steps(self, num_inference_steps: int, **given: Sequence[float] | None) -> dict[str, Any]:
        """The arguments of the scheduler's ``set_timesteps``."""
        chosen = {name: values for name, values in given.items() if values is not None}
        if len(chosen) > 1:
            got = " and ".join(map(repr, given.values()))
            raise ValueError(f"timesteps or sigmas must be given, not both, got {got}")
        for name in chosen.keys() - inspect.signature(self.scheduler.set_timesteps).parameters.keys():
            kind = type(self.scheduler).__name__
            raise ValueError(f"{name} must be None for {kind}, which takes none, got {chosen[name]!r}")
        for name, values in chosen.items():
            _check_grid(name, values, len(self.scheduler.alphas_cumprod) if name == "timesteps" else math.inf)
            if name == "sigmas" and values[-1] > 0:
                chosen[name] = [*values, 0.0]  # the last step ends without noise
            if name == "timesteps" and not hasattr(self.scheduler, "curve") and np.any(np.mod(np.asarray(values), 1)):
                kind = type(self.scheduler).__name__
                raise ValueError(f"timesteps must be integers for {kind}, which cuts off fractions, got {values!r}")
        most = len(self.scheduler.alphas_cumprod)
        # between the timesteps of training only a grid in the log-SNR has room for more
        if not chosen and num_inference_steps > most and self.scheduler.config.get("timestep_spacing") != "log_snr":
            raise ValueError(f"num_inference_steps must be at most the {most} of training, got {num_inference_steps}")
        return chosen or {"num_inference_steps": num_inference_steps}

    def _most_likely_images(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """The most likely image of each of the latents: shape ``(B, C, H, W)``, in [0, 1]."""
        parts = latents.to(self._execution_device, self.vae.dtype).split(_BATCH)
        # a logistic tail needs more digits than a half-precision decoder has
        outputs = (decoder_output(self.vae, codes_of(self.vae, part), size).float() for part in parts)
        return torch.cat([most_likely_images(output, *decoder_meaning(self.vae)) for output in outputs])

    def _expected_images(self, latents: Tensor) -> Tensor:
        """The decoder's mean image of each of the latents, differentiable: shape ``(B, C, H, W)``, in [0, 1]."""
        decoded = decoder_output(self.vae, codes_of(self.vae, latents))
        if self.decoder_likelihood == "bernoulli":
            return torch.sigmoid(decoded)
        return ((decoded + 1) / 2).clamp(0, 1)

    def _best(self, images: Tensor, latents: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """For each of T targets, the best of its neighbouring candidates ``(B, *)`` by predicted response."""
        predicted = self.predict_response(images).unflatten(0, (len(wanted), -1))
        best = self.response_predictor.response_error(predicted, wanted[:, None]).argmin(1)
        best = best + predicted.shape[1] * torch.arange(len(best), device=best.device)
        return images[best.to(images.device)], latents[best.to(latents.device)]

    def _refinement_begin(self) -> int:
        """Index of the scheduler's timestep at which a refinement begins."""
        levels = [self._log_snr(t) for t in self.scheduler.timesteps]
        begin = next((i for i, level in enumerate(levels) if level >= _REFINEMENT_LOG_SNR), len(levels) - 1)
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
        r"""The denoiser's output ``(B, C, h, w)`` with :math:`\hat z_0` moved towards wanted responses."""
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


def codes_of(vae: Any, latents: Tensor) -> Tensor:
    r"""The codes :math:`z = z_0 / s + m` of latents, of the same shape."""
    return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)


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
    r"""Log-probability of every pixel of ``images`` under the decoder's output, in nats, of their shape.

    Args:
        decoded: Output of the decoder network, shape ``(B, C, H, W)``.
        images: Pixel values in [0, 1], multiples of 1/255, same shape; 0 or 1 for ``bernoulli``.
        likelihood: What the decoder's output means, see this module's text.
        scale: Scale of the logistic distribution on [0, 1]; ``discretized_logistic`` needs it.

    Raises:
        ValueError: If the likelihood is unknown, or a scale is missing.

    Example:
        >>> decoder_log_prob(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), "bernoulli")
        tensor([[[[-0.6931]]]])
    """
    if likelihood == "bernoulli":
        return logsigmoid(torch.where(images > 0.5, decoded, -decoded))
    check_choice("likelihood", likelihood, get_args(DecoderLikelihood))
    if scale is None:
        raise ValueError("scale must be a positive number for a discretized_logistic decoder, got None")
    scale = torch.as_tensor(scale, dtype=decoded.dtype, device=decoded.device)
    offset = images - (decoded + 1) / 2
    half_bin = 0.5 / _LEVELS
    below = logsigmoid((offset + half_bin) / scale)  # log-mass of all values up to this bin
    above = logsigmoid((half_bin - offset) / scale)  # log-mass of all values from this bin on
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)) keeps the digits that the difference loses
    inside = below + above + torch.log(-torch.expm1(-1 / (_LEVELS * scale)))
    return torch.where(images < half_bin, below, torch.where(images > 1 - half_bin, above, inside))


def most_likely_images(decoded: Tensor, likelihood: str, scale: Tensor | float | None = None) -> Tensor:
    """The most likely image of a decoder's output: binary for ``bernoulli``, multiples of 1/255 otherwise.

    Arguments are as in :func:`decoder_log_prob`. The images lie in [0, 1] and have the shape and dtype of ``decoded``.
    A background close to 0 becomes exactly 0, because the outer bins extend to infinity. The response depends on it.
    """
    if likelihood == "bernoulli":
        return (decoded > 0).to(decoded.dtype)
    nearest = torch.round((decoded + 1) / 2 * _LEVELS).clamp(1, _LEVELS - 1) / _LEVELS  # best of the closed bins
    candidates = torch.stack([torch.zeros_like(decoded), nearest, torch.ones_like(decoded)])
    log_probs = torch.stack([decoder_log_prob(decoded, image, likelihood, scale) for image in candidates])
    return candidates.gather(0, log_probs.argmax(0, keepdim=True))[0]


def output_from_velocity(prediction_type: str, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    r""":math:`a, b` of a network's output :math:`a \hat v + b x_t`, by the velocity (Salimans & Ho 2022, section 4)."""
    pairs = {"epsilon": (alpha, sigma), "v_prediction": (1.0, 0.0), "sample": (-sigma, alpha)}
    pairs["score"] = (-alpha / sigma, -1.0)
    return pairs[prediction_type]


def record_training_schedule(unet: Any, scheduler: Any) -> None:
    """Writes the noise schedule and prediction type that a denoiser is trained for into its configuration."""
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
    # by name: a scheduler of ours that a checkpoint ships is another class than the installed one
    name = type(scheduler).__name__
    if not any(cls.__name__ in _SCHEDULERS for cls in type(scheduler).__mro__):
        raise ValueError(f"scheduler must be one of {', '.join(_SCHEDULERS)}, got {name}")
    # a configuration may have options of other classes
    options = inspect.signature(type(scheduler).__init__).parameters
    for option, fits in _FIT_SETTINGS.items():
        if option in options and not fits(value := scheduler.config[option]):
            got = f"{name} with {option}={value!r}"
            remedy = f"make it by {name}.from_config(pipe.scheduler.config, ...) without that"
            raise ValueError(f"scheduler must neither clip nor follow another process, got {got}; {remedy}")


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
        got = f"{channels[0]} in and {channels[1]} out"
        raise ValueError(f"unet must have the {vae.config.latent_channels} channels of the vae's latents, got {got}")
    if encoder.config.token_dim != unet.config.cross_attention_dim:
        wanted = f"tokens of the unet's cross_attention_dim={unet.config.cross_attention_dim}"
        raise ValueError(f"response_encoder must make {wanted}, got token_dim={encoder.config.token_dim}")
    if predictor is not None:
        ours, its = encoder.config.spec or {}, predictor.config.spec
        # checkpoints of the first edition say nothing of signed
        if other := [name for name in {**ours, **its} if _plain(ours.get(name)) != _plain(its.get(name))]:
            got = f"another {other[0]}: {its.get(other[0])!r}, not {ours.get(other[0])!r}"
            raise ValueError(f"response_predictor must predict the responses of response_encoder, got {got}")
        for name in ("scale", "mean", "std"):
            if not np.allclose(predictor.config[name], encoder.config[name], rtol=1e-6, atol=0):
                got = f"another {name}: {predictor.config[name]!r}, not {encoder.config[name]!r}"
                raise ValueError(f"response_predictor must normalise responses as response_encoder does, got {got}")


def _plain(entry: Any) -> str:
    """An entry of a specification as JSON has it, to compare it; one that is missing is one that is false."""
    return json.dumps(entry or False)


def check_choice(name: str, choice: Any, accepted: Sequence[str]) -> None:
    """Raises a ``ValueError`` unless an argument is one of those accepted."""
    if choice not in accepted:
        raise ValueError(f"{name} must be one of {tuple(accepted)}, got {choice!r}")


def check_count(name: str, count: Any, least: int = 1) -> None:
    """Raises a ``ValueError`` unless an argument is an integer of at least ``least``."""
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {count!r}")


def check_number(name: str, value: Any, most: float = math.inf) -> None:
    """Raises a ``ValueError`` unless an argument is a number in [0, ``most``], and finite."""
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


def _guide(prediction: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance, its standard deviation brought back to the conditional one's by a share."""
    unconditional, conditional = prediction.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    if not rescale:
        return guided
    spread = conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    return torch.lerp(guided, guided * spread, rescale)


def _beside(kept: Tensor, candidates: Tensor) -> Tensor:
    """Each kept sample, followed by its own candidates."""
    return torch.cat([kept[:, None], candidates.unflatten(0, (len(kept), -1))], dim=1).flatten(0, 1)


def one_for_each(generator: Generators, num: int) -> list[torch.Generator] | None:
    """A list of generators, one for each image, or ``None``."""
    if isinstance(generator, torch.Generator):
        return spread(generator, num)
    one_each = isinstance(generator, list) and len(generator) == num
    if generator is not None and not (one_each and all(isinstance(each, torch.Generator) for each in generator)):
        got = [type(each).__name__ for each in generator] if isinstance(generator, list) else repr(generator)
        raise ValueError(f"generator must be one or a list of {num}, one an image, got {got}")
    return generator


def spread(generator: torch.Generator, num: int) -> list[torch.Generator]:
    """One generator for each image, seeded in order: a longer list starts like a shorter one."""
    seeds = torch.randint(2**62, (num,), generator=generator, device=generator.device).tolist()
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]


def _likelihood_package() -> Any:
    try:
        return importlib.import_module("mechdiffusers.likelihood")
    except ImportError as error:
        raise ImportError("likelihoods and interpolation need the package: pip install mechdiffusers") from error
