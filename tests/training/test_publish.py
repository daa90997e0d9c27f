"""The card of a run, and its way to the Hub (``hub_server.py``)."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from hub_server import READER
from mechdiffusers.evaluation.plots import save_image_grid
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.training import TrainingConfig, parse_config
from mechdiffusers.training.publish import model_card, publish
from mechdiffusers.training.train import train
from small_runs import command_line, small, start

REPO = "mechanic/composites"
METRICS = {
    "autoencoder/elbo_nats": -123.4,
    "autoencoder/wrong_pixels": 2.5e-4,
    "denoiser/loss": 0.125,
    "denoiser/something_new": 7,
}


@pytest.fixture
def run(make_pipeline, tmp_path) -> Path:
    """The folder of a finished run, as training leaves it."""
    folder = tmp_path / "runs" / "quick"
    make_pipeline().save_pretrained(folder / "pipeline")
    config = TrainingConfig(output_dir=str(folder), num_train_designs=48, num_heldout_designs=16, kl_weight=0.01)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    for step, stiff in ((4, 0.0), (12, 1.0)):
        save_image_grid(np.full((4, 8, 8), stiff), folder / "validation" / f"denoiser-{step:08d}.png")
    return folder


def change(run: Path, **settings: object) -> None:
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **settings}))


def test_a_run_is_published_in_one_commit_with_checkpoint_card_and_newest_samples(hub, run, tmp_path):
    url = publish(run, "composites")
    first, published = hub.repositories[REPO].branches["main"]
    assert first.files == {}
    assert url == f"{hub.url}/{REPO}/commit/{published.sha}"
    assert published.files == {
        str(path.relative_to(run / "pipeline")): path.read_bytes()
        for path in (run / "pipeline").rglob("*")
        if path.is_file()
    }
    assert published.files["samples.png"] == (run / "validation" / "denoiser-00000012.png").read_bytes()
    loaded = LatentDDPMPipeline.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    assert type(loaded) is LatentDDPMPipeline


def test_the_card_comes_back_from_the_hub_with_every_metric_in_its_model_index(hub, run):
    publish(run, REPO)
    data = ModelCard.load(REPO).data
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "autoencoder_elbo_nats": -123.4,
        "autoencoder_wrong_pixels": 2.5e-4,
        "denoiser_loss": 0.125,
        "denoiser_something_new": 7,
    }
    assert {result.dataset_name for result in data.eval_results} == {"random_composites"}
    assert (data.model_name, data.library_name) == ("composites", "diffusers")
    assert "latent-diffusion" in data.tags


def test_the_card_holds_every_setting_so_that_the_run_can_be_made_again(run):
    text = str(model_card(run, REPO))
    shown = re.search(r"```yaml\n(.*?)```", text, re.S)[1]
    again = run / "again.yaml"
    again.write_text(shown)
    config = parse_config(["--config", str(again), "--output_dir", str(run)])
    assert asdict(config) == yaml.safe_load((run / "config.yaml").read_text())


def test_what_the_card_says_of_loading_runs(hub, run):
    publish(run, REPO)
    code = re.search(r"```python\n(.*?)```", ModelCard.load(REPO).text, re.S)[1]
    assert len(code.strip().splitlines()) <= 5
    names: dict = {}
    exec(code.replace("batch_size=16", "batch_size=2, num_inference_steps=2"), names)
    assert len(names["images"]) == 2


def test_the_card_counts_the_weights_and_leaves_no_gap(run):
    pipe = LatentDDPMPipeline.from_pretrained(run / "pipeline")
    text = str(model_card(run, REPO))
    for name in ("vae", "unet", "response_encoder"):
        num = sum(weight.numel() for weight in getattr(pipe, name).parameters())
        assert re.search(rf"^\| {name} \|.*\| {num:,} \|$", text, re.M)
    assert "8 x 8 pixels" in text
    assert "None" not in text
    assert "{{" not in text
    assert not re.search(r"\|\n\n\|", text)  # a blank line would end a table


def test_the_card_keeps_the_paths_of_the_machine_to_itself(run, tmp_path):
    designs = tmp_path / "secret project" / "designs"
    designs.mkdir(parents=True)
    for dataset in (str(designs), str(designs / "all.parquet")):
        change(run, dataset=dataset, num_train_designs=None)
        card = model_card(run, REPO)
        assert str(tmp_path) not in str(card)
        assert "secret project" not in str(card)
        assert f"All designs of `{Path(dataset).name}`" in card.text
        assert card.data.datasets is None


def test_a_run_of_the_first_edition_has_a_card(run):
    """Which called the specification ``meaning``."""
    config = run / "pipeline" / "response_encoder" / "config.json"
    content = json.loads(config.read_text())
    expected = str(model_card(run, REPO))
    content["meaning"] = content.pop("spec")
    config.write_text(json.dumps(content))
    assert str(model_card(run, REPO)) == expected


def test_the_card_says_what_was_cropped_and_resized(run):
    change(run, dataset="micrograph.tif", num_train_designs=None, resize=256)
    card = model_card(run, REPO)
    assert "All designs of `micrograph.tif`, reduced by area to 256 pixels along the shorter side. 16 des" in card.text
    assert card.data.datasets is None
    change(run, dataset="micrograph.tif", num_train_designs=None, resize=256, crop_size=64, num_crops=5000)
    assert (
        "5,000 crops of 64 x 64 pixels, drawn by the seed from `micrograph.tif`, reduced by"
        in model_card(run, REPO).text
    )
    assert "No crop to train on overlaps a held-out one" in model_card(run, REPO).text


def test_a_dataset_of_the_hub_is_in_the_metadata(run):
    change(run, dataset="someone/mechanical-mnist", num_train_designs=60_000)
    card = model_card(run, REPO)
    assert card.data.datasets == ["someone/mechanical-mnist"]
    assert "60,000 designs of `someone/mechanical-mnist`" in card.text


def test_publishing_again_replaces_the_card(hub, run):
    publish(run, REPO)
    (run / "metrics.json").write_text(json.dumps({**METRICS, "denoiser/loss": 0.0625}))
    publish(run, REPO, commit_message="Trained on")
    commits = hub.repositories[REPO].branches["main"]
    assert [commit.subject for commit in commits[1:]] == ["Upload composites with its card", "Trained on"]
    changed = {path for path in commits[2].files if commits[2].files[path] != commits[1].files[path]}
    assert changed == {"README.md"}
    assert b"0.0625" in commits[2].files["README.md"]


def test_what_a_killed_save_has_left_is_not_published(hub, run):
    left = run / "pipeline" / ".unfinished-abc" / "unet" / "diffusion_pytorch_model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    publish(run, REPO)
    assert not [name for name in hub.repositories[REPO].branches["main"][-1].files if "unfinished" in name]


@pytest.mark.parametrize(
    "part", ["config.yaml", "metrics.json", "pipeline/model_index.json", "validation/denoiser-*.png"]
)
def test_a_run_that_is_not_finished_is_not_published(hub, run, part):
    for path in run.glob(part):
        path.unlink()
    with pytest.raises(ValueError, match=f"^output_dir must hold a finished run, got .*{re.escape(part)}$"):
        publish(run, REPO)
    assert hub.repositories == {}
    assert not (run / "pipeline" / "README.md").exists()


def test_a_metric_that_is_no_number_is_not_published(hub, run):
    (run / "metrics.json").write_text('{"denoiser/loss": NaN}')
    with pytest.raises(ValueError, match="^metrics.json must hold finite numbers, got denoiser/loss=nan"):
        publish(run, REPO)
    assert hub.repositories == {}


def test_a_token_that_may_not_write_is_refused_before_the_run_is_touched(hub, run):
    with pytest.raises(ValueError, match="^repo_id must be a repository that your token may write to"):
        publish(run, REPO, token=READER)
    assert not (run / "pipeline" / "README.md").exists()
    assert hub.repositories == {}


def test_a_training_ends_on_the_hub_where_that_is_wanted(hub, tmp_path):
    train(small(tmp_path / "composites", push_to_hub=True))
    data = ModelCard.load(REPO).data
    types = {result.metric_type for result in data.eval_results}
    assert types >= {"denoiser_loss", "denoiser_two_point_error", "autoencoder_elbo_nats"}
    assert "denoiser_seconds_per_step" not in types
    loaded = LatentDDPMPipeline.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    assert loaded.unet.config.block_out_channels == [8, 8]


def test_a_training_that_may_not_be_published_does_not_begin(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: READER)
    with pytest.raises(ValueError, match="^repo_id must be a repository that your token may write to"):
        train(small(tmp_path / "composites", push_to_hub=True))
    assert not (tmp_path / "composites" / "checkpoints").exists()


def test_a_hub_that_is_not_there_is_said_so(tmp_path, monkeypatch):
    with monkeypatch.context() as unplugged:
        unplugged.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
        process = start([*command_line(tmp_path / "run"), "--push_to_hub", "true"])
        messages = process.communicate()[1]
    assert process.returncode == 1
    assert re.match("error: the Hub could not be reached: .*; nothing was trained$", messages.splitlines()[-1])


def test_a_run_that_could_not_be_uploaded_is_published_when_it_goes_on(hub, tmp_path, monkeypatch):
    def break_off(*_, **__):
        raise OSError("connection lost")

    with monkeypatch.context() as broken:
        broken.setattr("mechdiffusers.pipelines.portable_checkpoint.upload_folder", break_off)
        with pytest.raises(OSError, match="the Hub could not be reached: connection lost; the run itself is complete"):
            train(small(tmp_path / "composites", push_to_hub=True))
    assert (tmp_path / "composites" / "pipeline" / "model_index.json").exists()
    train(small(tmp_path / "composites", push_to_hub=True, resume_from_checkpoint="latest"))
    assert "model_index.json" in hub.repositories[REPO].branches["main"][-1].files
