"""A save replaces the weights of its components and variant, on disk and on the Hub, and leaves all others."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch

from mechdiffusers.pipelines import LatentDDPMPipeline

REPO = "mechanic/composites"


def sample(pipe) -> torch.Tensor:
    return pipe(
        batch_size=3, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images


def load(tmp_path: Path, **options: object) -> LatentDDPMPipeline:
    return LatentDDPMPipeline.from_pretrained(REPO, cache_dir=tmp_path / "cache", **options)


def shift(pipe) -> None:
    """Changes the weights of every network."""
    with torch.no_grad():
        for part in pipe.components.values():
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                parameter += 0.25


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SHARDS = [{"max_shard_size": "20KB"}, {"max_shard_size": "6KB"}, {}]


@pytest.mark.parametrize("variant", [None, "fp32"])
@pytest.mark.parametrize("before", SHARDS)
@pytest.mark.parametrize("after", SHARDS)
def test_a_save_replaces_the_weights_of_its_components_however_they_are_split(
    make_pipeline, tmp_path, before, after, variant
):
    pipe = make_pipeline(predictor=True)
    pipe.save_pretrained(tmp_path / "again", variant=variant, **before)
    shift(pipe)
    pipe.save_pretrained(tmp_path / "again", variant=variant, **after)
    pipe.save_pretrained(tmp_path / "new", variant=variant, **after)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "new")
    loaded = LatentDDPMPipeline.from_pretrained(tmp_path / "again", variant=variant)
    assert torch.equal(sample(loaded), sample(pipe))


@pytest.mark.parametrize("options", SHARDS)
def test_a_save_leaves_other_variants_and_files_of_other_names(make_pipeline, tmp_path, options):
    pipe = make_pipeline(predictor=True)
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    names = ("README.md", "unet/notes.txt", "own_unet/diffusion_pytorch_model.safetensors")
    for name in (*names, "unet/pytorch_lora_weights.ema.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = files_of(tmp_path)
    shift(pipe)
    pipe.save_pretrained(tmp_path, variant="ema", **options)
    after = files_of(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(".ema" in name for name in after.keys() - before.keys())
    parts = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert parts == {"response_encoder", "response_predictor", "unet", "vae"}
    (tmp_path / "own_unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "unet" / "pytorch_lora_weights.ema.safetensors").unlink()
    assert torch.equal(sample(LatentDDPMPipeline.from_pretrained(tmp_path)), expected)
    ema = LatentDDPMPipeline.from_pretrained(tmp_path, variant="ema")
    assert torch.equal(sample(ema), sample(pipe))
    loaded, (design,) = LatentDDPMPipeline.from_pretrained(tmp_path), torch.ones(1, 1, 1, 8, 8)
    assert not torch.equal(loaded.predict_response(design), ema.predict_response(design))


def test_every_network_is_split_where_shards_are_asked_for(make_pipeline, tmp_path):
    pipe = make_pipeline(predictor=True)
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="6KB")
    for part in ("unet", "vae", "response_predictor"):
        names = {path.name for path in (tmp_path / part).glob("*.safetensors")}
        assert len(names) > 1, part
        assert all("fp16" in name and "-of-" in name for name in names), names
        assert (tmp_path / part / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    loaded = LatentDDPMPipeline.from_pretrained(tmp_path, variant="fp16")
    design = torch.ones(1, 1, 8, 8)
    assert torch.equal(loaded.predict_response(design), pipe.predict_response(design))


def saved_through_a_link(pipe, target: Path, link: Path) -> None:
    link.symlink_to(target, target_is_directory=True)
    pipe.save_pretrained(link, max_shard_size="20KB")
    shift(pipe)
    pipe.save_pretrained(link)
    assert link.is_symlink()
    assert not [path for path in [*target.rglob("*"), *link.parent.glob("*")] if path.name.startswith(".unfinished")]
    assert torch.equal(sample(LatentDDPMPipeline.from_pretrained(link)), sample(pipe))
    pipe.save_pretrained(link.parent / "new")
    assert files_of(target) == files_of(link.parent / "new")


def test_a_link_to_another_file_system_is_written_through(pipe, tmp_path):
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm, on another file system than the tests")
    with tempfile.TemporaryDirectory(dir=memory) as target:
        saved_through_a_link(pipe, Path(target), tmp_path / "link")


def test_other_failures_to_move_a_file_are_not_hidden_and_leave_nothing_unfinished(pipe, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mechdiffusers.pipelines.portable_checkpoint.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", [{}, {"max_shard_size": "6KB"}])
def test_a_push_replaces_weights_that_were_split_otherwise_in_one_commit(hub, make_pipeline, tmp_path, after):
    pipe = make_pipeline(predictor=True)
    pipe.push_to_hub(REPO, max_shard_size="20KB", card="# Mine")
    pipe.push_to_hub(REPO, variant="ema")
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
        pipe.response_predictor.head[-1].bias.zero_()  # no digits that half precision lacks
    pipe.push_to_hub(REPO, **after)
    *_, before, last = commits = hub.repositories[REPO].branches["main"]
    assert len(commits) == 4  # the first is the repository's own
    pipe.save_pretrained(tmp_path / "new", **after)
    new = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    ema = {path for path in before.files if ".ema" in path}
    assert set(last.files) == {*new, *ema, "README.md"}
    loaded = load(tmp_path)
    assert torch.equal(sample(loaded), sample(pipe))
    design = torch.ones(1, 1, 8, 8)
    assert torch.equal(loaded.predict_response(design), pipe.predict_response(design))
    assert not torch.equal(sample(load(tmp_path, variant="ema")), sample(pipe))


def test_a_pull_request_and_a_branch_lose_the_weights_that_they_replace_and_the_main_one_keeps_them(
    hub, pipe, tmp_path
):
    pipe.push_to_hub(REPO, max_shard_size="20KB")
    expected, before = sample(pipe), set(hub.repositories[REPO].branches["main"][-1].files)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    pipe.push_to_hub(REPO, revision="whole")
    pipe.push_to_hub(REPO, create_pr=True)
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    for branch in ("whole", "refs/pr/1"):
        assert index not in hub.repositories[REPO].branches[branch][-1].files
    assert set(hub.repositories[REPO].branches["main"][-1].files) == before
    assert torch.equal(sample(load(tmp_path, revision="whole")), sample(pipe))
    assert torch.equal(sample(load(tmp_path)), expected)


def test_save_pretrained_pushes_its_variant_and_shards(hub, make_pipeline, tmp_path):
    pipe = make_pipeline(predictor=True)
    pipe.save_pretrained(tmp_path / "composites", variant="ema", max_shard_size="6KB", push_to_hub=True)
    pushed = hub.repositories[REPO].branches["main"][-1].files
    saved = {p.relative_to(tmp_path / "composites").as_posix(): p for p in (tmp_path / "composites").rglob("*.*")}
    assert {path: data for path, data in pushed.items() if path != "README.md"} == {
        path: file.read_bytes() for path, file in saved.items()
    }
    assert sum(path.endswith(".safetensors") and ".ema" in path for path in pushed) > 6
