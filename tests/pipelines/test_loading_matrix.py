"""Every way from one checkpoint to another: by folders and the Hub, with the package and in a Python without it.

Each route is a script, which ``plain_diffusers`` runs where there is no mechdiffusers, and this process where there is.
"""

import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mechdiffusers.pipelines.pipeline_latent_ddpm import record_training_schedule
from mechdiffusers.schedulers import VDMScheduler

WITH_THE_PACKAGE = """
from mechdiffusers.pipelines import LatentDDPMPipeline

def load(source, **options):
    return LatentDDPMPipeline.from_pretrained(source, **options)
"""
WITHOUT_THE_PACKAGE = """
import importlib.util
from diffusers import DiffusionPipeline

assert importlib.util.find_spec("mechdiffusers") is None

def load(source, **options):
    return DiffusionPipeline.from_pretrained(source, trust_remote_code=True, use_safetensors=True, **options)
"""
#: What every route knows: ``source`` is the checkpoint, ``on_the_hub`` whether it is there, ``folder`` one to write to.
COMMON = """
import torch

def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "num_candidates": 2, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    return pipe(response=torch.load(f"{folder}/response.pt"), generator=generator, **options).images

def check(pipe, expected="expected"):
    assert type(pipe).__name__ == "LatentDDPMPipeline"
    assert torch.equal(sample(pipe), torch.load(f"{folder}/{expected}.pt"))

def put(pipe, name, **options):
    if on_the_hub:
        pipe.push_to_hub(f"mechanic/{name}", **options)
        return f"mechanic/{name}"
    pipe.save_pretrained(f"{folder}/{name}", **options)
    return f"{folder}/{name}"
"""
#: The file that a user writes; ``load`` stands in it too.
USERS_FILE = """
class MyPipe(type(load(SOURCE))):
    def mean_image(self, **options):
        return self(output_type="pt", **options).images.mean(0)
"""
ROUTES = {
    "load": """
        check(load(source))
    """,
    "save": """
        load(source).save_pretrained(f"{folder}/saved")
        check(load(f"{folder}/saved"))
    """,
    "push": """
        load(source).push_to_hub("mechanic/pushed")
        check(load("mechanic/pushed"))
    """,
    "load again": """
        again = put(load(source), "again")
        and_again = put(load(again), "and-again")
        check(load(and_again))
    """,
    "subclass": """
        from users_file import MyPipe

        trust = {} if PACKAGE else {"trust_remote_code": True}
        mine = MyPipe.from_pretrained(source, **trust)
        assert type(mine) is MyPipe
        assert torch.equal(sample(mine), torch.load(f"{folder}/expected.pt"))
        assert mine.mean_image(num_inference_steps=2).shape == (1, 8, 8)
        check(load(put(mine, "saved")))
        check(load(put(MyPipe(**load(source).components), "made")))
    """,
    "from_pipe": """
        pipe = load(source)
        again = type(pipe).from_pipe(pipe)
        check(again)
        check(load(put(again, "saved")))
    """,
    "compile": """
        pipe = load(source)
        pipe.unet = torch.compile(pipe.unet)
        pipe.response_encoder = torch.compile(pipe.response_encoder)
        check(load(put(pipe, "saved")))
    """,
    "fp16 variant": """
        pipe = load(source)
        saved = put(pipe.to(torch.float16), "saved", variant="fp16")
        check(load(saved, variant="fp16").to(torch.float32), "rounded")
        put(load(source), "saved")
        check(load(saved))
        check(load(saved, variant="fp16").to(torch.float32), "rounded")
    """,
    "sharded": """
        saved = put(load(source), "saved", max_shard_size="6KB")
        check(load(saved))
        check(load(put(load(saved), "saved")))
    """,
}


def run_here(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "users_file", raising=False)
    exec(compile(script, "<route>", "exec"), {"__name__": "route"})
    sys.modules.pop("users_file", None)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("python", ["package", pytest.param("no package", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_samples_are_the_same_to_the_bit_behind_every_route(
    hub,
    make_pipeline: Callable,
    plain_diffusers: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    python: str,
    route: str,
):
    pipe = make_pipeline(predictor=True, decoder_likelihood="discretized_logistic", decoder_scale=1e-3)
    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, log_snr="cosine")
    record_training_schedule(pipe.unet, pipe.scheduler)
    source = str(tmp_path / "checkpoint")
    if where == "hub":
        source = "mechanic/source"
        pipe.push_to_hub(source)
    else:
        pipe.save_pretrained(source)

    torch.save(pipe.predict_response((torch.rand(3, 8, 8) < 0.5).float()), tmp_path / "response.pt")
    scope = {"folder": tmp_path}
    exec(COMMON, scope)
    torch.save(scope["sample"](pipe), tmp_path / "expected.pt")
    torch.save(scope["sample"](pipe.to(torch.float16).to(torch.float32)), tmp_path / "rounded.pt")
    assert not torch.equal(*(torch.load(tmp_path / f"{name}.pt") for name in ("expected", "rounded")))

    known = (
        f"source, folder, on_the_hub, PACKAGE = {source!r}, {str(tmp_path)!r}, {where == 'hub'}, {python == 'package'}"
    )
    loading = WITH_THE_PACKAGE if python == "package" else WITHOUT_THE_PACKAGE
    (tmp_path / "users_file.py").write_text(loading + USERS_FILE.replace("SOURCE", repr(source)))
    script = os.linesep.join([known, COMMON, loading, textwrap.dedent(ROUTES[route])])
    if python == "package":
        run_here(script, tmp_path, monkeypatch)
    else:
        plain_diffusers(script)
