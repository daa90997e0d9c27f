"""Networks that diffusers does not have."""

from mechdiffusers.models.response_encoder import ResponseEncoder

__all__ = ["ResponseEncoder"]
