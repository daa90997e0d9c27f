"""Networks that diffusers does not have."""

from mechdiffusers.models.monotone_noise_schedule import MonotoneNoiseSchedule
from mechdiffusers.models.response_encoder import ResponseEncoder

__all__ = ["MonotoneNoiseSchedule", "ResponseEncoder"]
