"""What several tests need: a Hub on this machine, and a small pipeline with random weights."""

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable

import pytest

from hub_server import OWNER, HubServer

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # a core for each worker and all that it starts: threads that compete for a core wait for each other
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

# huggingface_hub reads these when it is imported: no test, nor what it starts, ever reaches the real Hub
HUB = HubServer()
HOME = tempfile.TemporaryDirectory(prefix="huggingface-")
os.environ.update(
    HF_ENDPOINT=HUB.url,
    HF_HOME=HOME.name,
    HF_TOKEN=OWNER,
    HF_HUB_OFFLINE="0",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)

import torch  # noqa: E402
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # noqa: E402

from mechdiffusers.models import ResponseEncoder, ResponsePredictor  # noqa: E402
from mechdiffusers.pipelines import LatentDDPMPipeline  # noqa: E402

#: Run before anything else in a Python that has to do without our package and without what only training needs.
WITHOUT_US = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        absent = ("mechdiffusers", "accelerate", "datasets", "tensorboard", "matplotlib", "scipy")
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

SPEC = {
    "quantity": "stress",
    "load_cases": ["uniaxial_extension", "shear"],
    "strains": [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]],
    "units": "modulus of the soft phase",
}


def tiny_pipeline(
    size: int | tuple[int, int] = 8,
    conditional: bool = False,
    predictor: bool = False,
    decoder_likelihood: str = "bernoulli",
    decoder_scale: float | None = None,
    **scheduler_options: object,
) -> LatentDDPMPipeline:
    """A pipeline of the real parts, small, with random weights; one with a predictor is conditional."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=2,
        norm_num_groups=2,
        sample_size=size,
        scaling_factor=0.7,
        shift_factor=0.2,
        mid_block_add_attention=False,
    )
    vae.register_to_config(_decoder_likelihood=decoder_likelihood, _decoder_scale=decoder_scale)
    unet = UNet2DConditionModel(
        sample_size=size,
        in_channels=2,
        out_channels=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=6,
        attention_head_dim=2,
    )
    normalisation = {"scale": [[0.5, 1.0, 2.0]] * 2, "mean": [[1.0, 2.0, 3.0]] * 2, "std": [[0.5, 1.0, 2.0]] * 2}
    responses = {"spec": SPEC, **normalisation}
    encoder = ResponseEncoder(token_dim=6, hidden_dim=8, **(responses if conditional or predictor else {}))
    scheduler = DDPMScheduler(**{"clip_sample": False, "prediction_type": "v_prediction", **scheduler_options})
    pipe = LatentDDPMPipeline(vae.eval(), unet.eval(), scheduler, encoder.eval())
    pipe.set_progress_bar_config(disable=True)
    if predictor:
        torch.manual_seed(1)
        symmetries = {"half_turn": [0, 1], "mirror": [0, None]}
        network = ResponsePredictor(block_out_channels=(4, 8), symmetries=symmetries, **responses)
        pipe.register_modules(response_predictor=network.half().float().eval())  # digits that a checkpoint keeps
    return pipe


@pytest.fixture
def make_pipeline() -> Callable[..., LatentDDPMPipeline]:
    return tiny_pipeline


@pytest.fixture
def pipe() -> LatentDDPMPipeline:
    return tiny_pipeline()


@pytest.fixture
def hub() -> HubServer:
    """The Hub of this machine, without repositories."""
    HUB.repositories.clear()
    HUB.large_files.clear()
    HUB.requests.clear()
    return HUB


@pytest.fixture
def plain_diffusers(tmp_path) -> Callable[[str], None]:
    """Runs a script in a Python that has torch, diffusers and transformers but not us, and nothing in its caches."""

    def run(script: str) -> None:
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, "-c", WITHOUT_US + textwrap.dedent(script)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the test of ten minutes: at the end, one core would wait for it."""
    items.sort(key=lambda item: "runs_word_for_word" not in item.name)
