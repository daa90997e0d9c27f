from pathlib import Path

import numpy as np
import pytest
import torch
from mechdiffusers.pipelines import LatentDDPMPipeline

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"


@pytest.mark.parametrize("name", ["composites-32", "mechanical-mnist"])
def test_a_released_checkpoint_has_at_most_20_megabytes(name):
    assert sum(path.stat().st_size for path in (CHECKPOINTS / name).rglob("*")) <= 20e6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "levels"), [("composites-32", 1), ("mechanical-mnist", 255)])
def test_a_released_checkpoint_answers_in_plain_diffusers_as_it_does_here(name, levels, tmp_path, plain_diffusers):
    pipe = LatentDDPMPipeline.from_pretrained(CHECKPOINTS / name)
    shape = pipe.vae.config.sample_size
    response = pipe.predict_response(np.ones((1, *([shape] * 2 if isinstance(shape, int) else shape))))
    options = {"num_inference_steps": 2, "output_type": "pt"}
    images = pipe(response=response, generator=torch.manual_seed(0), **options).images
    assert torch.equal((levels * images).round() / levels, images)
    torch.save((response, images), tmp_path / "expected.pt")
    script = f"""
        import torch
        from diffusers import DiffusionPipeline

        folder = {str(CHECKPOINTS / name)!r}
        response, expected = torch.load("expected.pt")
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, use_safetensors=True)
        images = pipe(response=response, generator=torch.manual_seed(0), **{options!r}).images
        assert torch.equal(images, expected)
    """
    plain_diffusers(script)
