"""The real client of the Hub, and a Hub on this machine."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from hub_server import READER
from huggingface_hub import ModelCard
from mechdiffusers.models import ResponseEncoder
from mechdiffusers.pipelines import LatentDDPMPipeline

from mechdiffusers.pipelines.hub_checkpoint import claim_repository

REPO = "mechanic/composites"
FILES = {
    "README.md",
    "hub_checkpoint.py",
    "latent_likelihood.py",
    "model_index.json",
    "pipeline_latent_ddpm.py",
    "portable_checkpoint.py",
    "response_encoder/config.json",
    "response_encoder/diffusion_pytorch_model.safetensors",
    "response_encoder/response_encoder.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
