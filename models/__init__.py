"""Networks that diffusers does not have."""

from mechdiffusers.models.monotone_noise_schedule import MonotoneNoiseSchedule
from mechdiffusers.models.noisy_latent_predictor import NoisyLatentPredictor
from mechdiffusers.models.response_encoder import ResponseEncoder, normalise_response, response_normalisation
from mechdiffusers.models.response_predictor import ResponsePredictor

__all__ = [
    "MonotoneNoiseSchedule",
    "NoisyLatentPredictor",
    "ResponseEncoder",
    "ResponsePredictor",
    "normalise_response",
    "response_normalisation",
]
