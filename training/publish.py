"""Publishing a finished run: one commit with its checkpoint, a grid of samples, and a card made from what it left.

Read from the run's folder: ``pipeline/``, ``config.yaml``, ``metrics.json`` (a mapping from ``"STAGE/NAME"`` to
the number that each stage's last validation gave) and the newest ``validation/denoiser-*.png``.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.microstructures.read_designs import DESIGN_SUFFIXES
from mechdiffusers.pipelines.portable_checkpoint import claim_repository, upload_checkpoint

__all__ = ["model_card", "publish", "write_card"]

_TASK = "unconditional-image-generation"
#: Settings that say where a run was and went, not what it trained.
_NOT_ON_THE_CARD = ("output_dir", "resume_from_checkpoint", "dry_run", "push_to_hub", "hub_model_id", "hub_private")
#: Metrics that say how the run went, not how good the model is.
_OF_THE_RUN = ("step", "seconds_per_step", "peak_memory_gib")
#: What the metrics of the stages are; others go by their names.
_DESCRIPTIONS = {
    "autoencoder/elbo_nats": "evidence lower bound of a design, nats",
    "autoencoder/reconstruction_nats": "its reconstruction term, nats",
    "autoencoder/kl_nats": "its KL term, nats",
    "autoencoder/elbo_bits_per_dim": "negative evidence lower bound, bits per pixel",
    "autoencoder/reconstruction_bits_per_dim": "its reconstruction term, bits per pixel",
    "autoencoder/kl_bits_per_dim": "its KL term, bits per pixel",
    "autoencoder/wrong_pixels": "fraction of pixels that the autoencoder reconstructs wrongly",
    "autoencoder/posterior_over_latent_std": "standard deviation of the posteriors over that of the latents",
    "autoencoder/loss": "loss of the autoencoder, nats per pixel, at the KL weight of the training",
    "autoencoder/step": "steps of the autoencoder",
    "autoencoder/seconds_per_step": "time of a step of the autoencoder, seconds",
    "autoencoder/peak_memory_gib": "memory up to the end of the autoencoder's stage, GiB",
    "denoiser/two_point_error": "error of the samples' two-point correlation",
    "denoiser/diversity_ratio": "diversity of the samples over the diversity of the held-out designs",
    "denoiser/step": "steps of the denoiser",
    "denoiser/seconds_per_step": "time of a step of the denoiser, seconds",
    "denoiser/peak_memory_gib": "memory up to the end of the denoiser's stage, GiB",
    "denoiser/loss": "weighted mean square error of the denoiser's prediction, all of the response given",
    "denoiser/loss_without_response": "the same without a response",
    "denoiser/elbo_nats": "evidence lower bound of the whole model in continuous time, nats",
    "denoiser/elbo_bits_per_dim": "its negative, bits per pixel",
    "predictor/step": "steps of the predictor",
    "predictor/seconds_per_step": "time of a step of the predictor, seconds",
    "predictor/peak_memory_gib": "memory up to the end of the predictor's stage, GiB",
    "predictor/loss": "mean square error of the predicted normalised response",
    "predictor/response_error": "error of the predicted response, as designs for a response are judged",
}


def publish(
    output_dir: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Uploads the checkpoint of a finished run with its card and a grid of samples, in one commit.

    Args:
        output_dir: Folder of the run.
        repo_id: ``"name"`` or ``"owner/name"``; made if need be.
        private: Whether a repository that is made is private; by default as its owner has set it.
        token: Access token; by default that of ``hf auth login`` or of ``HF_TOKEN``.
        commit_message: Subject of the commit.
        create_pr: Whether to open a pull request instead of committing.
        revision: Branch to commit to, made if need be; the main one by default.

    Returns:
        Address of the commit.

    Raises:
        ValueError: If the folder holds no finished run, ``repo_id`` may not be written to, or it exists and is public
            although ``private`` is set. Nothing has been committed then.

    Example:
        >>> publish("runs/quick", "quick-composites", private=True)  # doctest: +SKIP
        'https://huggingface.co/me/quick-composites/commit/...'
    """
    model_card(output_dir, repo_id)  # before a repository is made for it
    repo_id = claim_repository(repo_id, private=private, token=token)
    write_card(output_dir, repo_id)
    return upload_checkpoint(
        Path(output_dir) / "pipeline",
        repo_id,
        commit_message=commit_message or f"Upload {repo_id.split('/')[-1]} with its card",
        token=token,
        create_pr=create_pr,
        revision=revision,
    )


def write_card(output_dir: str | os.PathLike, repo_id: str) -> None:
    """Writes the card of a finished run, and its picture, into the run's ``pipeline`` folder.

    Args:
        output_dir: Folder of the run.
        repo_id: ``"owner/name"`` under which the checkpoint is loaded.

    Raises:
        ValueError: If the folder holds no finished run.
    """
    card, pipeline = model_card(output_dir, repo_id), Path(output_dir) / "pipeline"
    with atomic_write(pipeline / "samples.png") as unfinished:
        shutil.copyfile(_newest_samples(Path(output_dir)), unfinished)
    with atomic_write(pipeline / "README.md") as unfinished:
        unfinished.write_text(str(card), encoding="utf-8")


def model_card(output_dir: str | os.PathLike, repo_id: str) -> ModelCard:
    """The card of a finished run: how to load it, what was trained on what, every setting, every metric.

    Args:
        output_dir: Folder of the run.
        repo_id: ``"owner/name"`` under which the checkpoint is loaded.

    Returns:
        The card; its metadata hold the metrics as a model index.

    Raises:
        ValueError: If the folder holds no finished run, or a metric is no finite number.
    """
    run, name = Path(output_dir), repo_id.split("/")[-1]
    for part in ("config.yaml", "metrics.json", "pipeline/model_index.json"):
        if not (run / part).is_file():
            raise ValueError(f"output_dir must hold a finished run, got {run}, which has no {part}")
    _newest_samples(run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    if unfit := [key for key, value in metrics.items() if not math.isfinite(value)]:
        raise ValueError(f"metrics.json must hold finite numbers, got {unfit[0]}={metrics[unfit[0]]} in {run}")

    dataset, is_public = _dataset(settings["dataset"])
    descriptions = {key: _DESCRIPTIONS.get(key, key.replace("/", ": ").replace("_", " ")) for key in metrics}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=_TASK,
        tags=["mechanics", "microstructures", "latent-diffusion"],
        datasets=[dataset] if is_public else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=_TASK,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split="held out",
                metric_type=key.replace("/", "_"),
                metric_name=descriptions[key],
                metric_value=value,
            )
            for key, value in metrics.items()
            if key.rpartition("/")[2] not in _OF_THE_RUN
        ],
    )
    shown = {key: value for key, value in settings.items() if key not in _NOT_ON_THE_CARD} | {"dataset": dataset}
    size = json.loads((run / "pipeline" / "vae" / "config.json").read_text())["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    encoder = json.loads((run / "pipeline" / "response_encoder" / "config.json").read_text())
    return ModelCard.from_template(
        data,
        template_str=(files("mechdiffusers.model_cards") / "template.md").read_text(encoding="utf-8"),
        name=name,
        repo_id=repo_id,
        height=height,
        width=width,
        designs=_designs(settings, dataset),
        sampler=settings["validation_scheduler"],
        num_inference_steps=settings["validation_inference_steps"],
        num_heldout=settings["num_heldout_designs"],
        is_local=not is_public and dataset != "random_composites",
        settings_yaml=yaml.safe_dump(shown, sort_keys=False).strip(),
        spec=encoder.get("spec", encoder.get("meaning")),  # as the first edition called it
        parts=_parts(run / "pipeline", settings),
        metrics=[{"name": key, "description": descriptions[key], "value": value} for key, value in metrics.items()],
    )


def _newest_samples(run: Path) -> Path:
    """The last grid of samples of a run."""
    grids = sorted((run / "validation").glob("denoiser-*.png"))
    if not grids:
        raise ValueError(f"output_dir must hold a finished run, got {run}, which has no validation/denoiser-*.png")
    return grids[-1]


def _dataset(source: str) -> tuple[str, bool]:
    """What a card may say of where the designs came from, and whether that is a dataset on the Hub.

    A path is a matter of the machine that the run was on: of one, the card has the last part alone.
    """
    if source == "random_composites":
        return source, False
    is_file = Path(source).suffix.lower() in {".parquet", *DESIGN_SUFFIXES}
    is_public = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not is_file
    return (source, True) if is_public and not Path(source).exists() else (Path(source).name, False)


def _designs(settings: dict[str, Any], dataset: str) -> str:
    """What was trained on, as a phrase."""
    num = settings["num_train_designs"]
    if dataset == "random_composites":
        return (
            f"{num:,} random composites of `mechdiffusers.random_composites`, seed {settings['seed']}: thresholded, "
            "periodic, anisotropic Gaussian random fields"
        )
    size, side = settings.get("crop_size"), settings.get("resize")
    resized = "" if side is None else f", reduced by area to {side} pixels along the shorter side"
    if size is None:
        return f"{'All' if num is None else format(num, ',')} designs of `{dataset}`{resized}"
    return (
        f"{settings['num_crops']:,} crops of {size} x {size} pixels, drawn by the seed from `{dataset}`{resized}. No "
        "crop to train on overlaps a held-out one: those come from a strip at the end of each image"
    )


def _parts(pipeline: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the card's table of the model."""
    curve = "a learned curve of log-SNR" if settings["learned_noise_schedule"] else f"{settings['beta_schedule']} betas"
    what = {
        "vae": f"`AutoencoderKL`, {settings['decoder_likelihood']} decoder, KL weight {settings['kl_weight']}",
        "unet": f"`UNet2DConditionModel`, predicts {settings['prediction_type']}, {curve}",
        "response_encoder": "`ResponseEncoder`, which gives the tokens that the denoiser attends to",
        "response_predictor": "`ResponsePredictor`, which draws samples towards a wanted response",
    }
    there = [name for name in what if (pipeline / name).is_dir()]
    return [{"name": name, "what": what[name], "num_parameters": _num_parameters(pipeline / name)} for name in there]


def _num_parameters(folder: Path) -> int:
    """Number of weights in the safetensors files of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as weights:
            total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return total
