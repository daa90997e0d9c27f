"""The real client of the Hub against a Hub on this machine (``hub_server.py``)."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from hub_server import OWNER, READER, Refusal
from mechdiffusers.models import ResponseEncoder
from mechdiffusers.pipelines import LatentDDPMPipeline

REPO = "mechanic/composites"


def sample(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=3, num_inference_steps=3, generator=generator, output_type="pt").images


def load(tmp_path: Path, repo_id: str = REPO, **options: object) -> LatentDDPMPipeline:
    return LatentDDPMPipeline.from_pretrained(repo_id, cache_dir=tmp_path / "cache", **options)


def subjects(hub, repo_id: str = REPO, branch: str = "main") -> list[str]:
    return [commit.subject for commit in hub.repositories[repo_id].branches[branch]]


def test_a_push_is_one_commit_that_holds_every_file_and_a_card(hub, pipe, tmp_path):
    url = pipe.push_to_hub(REPO)
    pipe.save_pretrained(tmp_path / "saved")
    saved = {
        str(path.relative_to(tmp_path / "saved")): path.read_bytes()
        for path in (tmp_path / "saved").rglob("*")
        if path.is_file()
    }
    first, pushed = hub.repositories[REPO].branches["main"]
    assert (first.files, pushed.subject) == ({}, "Upload LatentDDPMPipeline")
    card = pushed.files.pop("README.md").decode()
    assert pushed.files == saved
    assert f'from_pretrained("{REPO}", trust_remote_code=True' in card
    assert url.startswith(f"{hub.url}/{REPO}/commit/")


def test_the_installed_class_loads_it_without_trusting_remote_code(hub, pipe, tmp_path):
    pipe.push_to_hub(REPO)
    loaded = load(tmp_path)
    assert type(loaded) is LatentDDPMPipeline
    assert type(loaded.response_encoder) is ResponseEncoder
    assert torch.equal(sample(loaded), sample(pipe))
    assert loaded.name_or_path == REPO
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(REPO, cache_dir=tmp_path / "cache")


def test_what_was_downloaded_loads_again_without_the_hub(hub, pipe, tmp_path):
    pipe.push_to_hub(REPO)
    load(tmp_path)
    hub.repositories.clear()
    hub.requests.clear()
    assert torch.equal(sample(load(tmp_path, local_files_only=True)), sample(pipe))
    assert hub.requests == []


@pytest.mark.slow
def test_plain_diffusers_loads_it_bit_identically_and_can_push_it_again(hub, pipe, tmp_path, plain_diffusers):
    pipe.push_to_hub(REPO)
    torch.save(sample(pipe), tmp_path / "expected.pt")
    script = """
        import torch
        from diffusers import DiffusionPipeline

        names = ["mechanic/composites", "mechanic/again", "mechanic/and-again"]
        for name, following in zip(names, [*names[1:], None]):
            pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, use_safetensors=True)
            generator = torch.Generator().manual_seed(0)
            images = pipe(batch_size=3, num_inference_steps=3, generator=generator, output_type="pt").images
            assert torch.equal(images, torch.load("expected.pt")), name
            if following:
                pipe.push_to_hub(following)
            else:
                pipe.save_pretrained("saved")
    """
    plain_diffusers(script)
    for copy in ("mechanic/again", "mechanic/and-again"):
        original, again = (hub.repositories[name].branches["main"][-1].files for name in (REPO, copy))
        assert {**again, "README.md": b""} == {**original, "README.md": b""}
        assert torch.equal(sample(load(tmp_path, copy)), sample(pipe))
    assert torch.equal(sample(LatentDDPMPipeline.from_pretrained(tmp_path / "saved")), sample(pipe))


def test_a_card_on_the_hub_stays_unless_another_is_given(hub, pipe):
    def card() -> str:
        return hub.repositories[REPO].branches["main"][-1].files["README.md"].decode()

    pipe.push_to_hub(REPO, card="# First")
    pipe.push_to_hub(REPO)
    assert card() == "# First"
    pipe.push_to_hub(REPO, card=ModelCard("---\nlicense: mit\n---\n\n# Second"))
    assert card() == "---\nlicense: mit\n---\n\n# Second"
    pipe.push_to_hub(REPO, revision="v2")  # a new branch has the card of main
    assert hub.repositories[REPO].branches["v2"][-1].files["README.md"].decode() == card()


def test_pushing_what_is_there_already_makes_no_commit_and_a_change_makes_one(hub, pipe):
    pipe.push_to_hub(REPO)
    pipe.push_to_hub(REPO)
    assert len(subjects(hub)) == 2  # the first commit is the repository's own
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    pipe.push_to_hub(REPO, commit_message="Shifted")
    assert subjects(hub)[2:] == ["Shifted"]
    *_, before, after = hub.repositories[REPO].branches["main"]
    changed = {path for path in after.files if after.files[path] != before.files[path]}
    assert changed == {"unet/diffusion_pytorch_model.safetensors"}


def test_each_revision_is_loaded_by_its_name(hub, pipe, tmp_path):
    first = pipe.push_to_hub(REPO).rsplit("/", 1)[1]
    expected = sample(pipe)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    pipe.push_to_hub(REPO, revision="shifted")
    for revision, images in ((None, expected), (first, expected), ("shifted", sample(pipe))):
        assert torch.equal(sample(load(tmp_path, revision=revision)), images)
    assert not torch.equal(sample(pipe), expected)


def test_save_pretrained_pushes_what_it_has_saved(hub, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "composites", push_to_hub=True, commit_message="Saved and pushed")
    assert subjects(hub)[1:] == ["Saved and pushed"]
    on_the_hub = hub.repositories[REPO].branches["main"][-1].files
    index = tmp_path / "composites" / "model_index.json"
    assert on_the_hub["model_index.json"] == index.read_bytes()
    assert not (tmp_path / "composites" / "README.md").exists()
    with pytest.raises(ValueError, match=r"^push_to_hub must be True where its arguments are given, got \['private'\]"):
        pipe.save_pretrained(tmp_path / "other", private=True)
    assert not (tmp_path / "other").exists()


def test_weights_in_several_files_and_of_a_variant_come_back(hub, pipe, tmp_path):
    pipe.push_to_hub(REPO, max_shard_size="20KB")
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in hub.repositories[REPO].branches["main"][-1].files
    assert torch.equal(sample(load(tmp_path)), sample(pipe))
    pipe.push_to_hub("mechanic/variant", variant="fp32")
    assert torch.equal(sample(load(tmp_path, "mechanic/variant", variant="fp32")), sample(pipe))


def test_a_pull_request_leaves_the_branch_alone(hub, pipe):
    pipe.push_to_hub(REPO, card="# Mine")
    pipe.push_to_hub(REPO, card="# Theirs", create_pr=True, token=READER)
    assert len(subjects(hub)) == 2
    assert len(subjects(hub, branch="refs/pr/1")) == 3


def test_a_private_checkpoint_is_for_its_owner(hub, pipe, tmp_path):
    pipe.push_to_hub(REPO, private=True)
    assert hub.repositories[REPO].private
    for token in (READER, False, "hf_invalid"):
        with pytest.raises(ValueError, match=f"^pretrained_model_name_or_path must be .* got '{REPO}', which "):
            load(tmp_path, token=token)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert torch.equal(sample(load(tmp_path, token=OWNER)), sample(pipe))


def test_what_is_meant_to_be_private_never_goes_to_a_public_repository(hub, pipe):
    pipe.push_to_hub(REPO)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    with pytest.raises(ValueError, match=f"^private must be left out for '{REPO}', which exists and is public"):
        pipe.push_to_hub(REPO, private=True)
    assert len(subjects(hub)) == 2


@pytest.mark.parametrize(("token", "status"), [(READER, 403), (False, 401), ("hf_invalid", 401)])
def test_a_push_that_is_not_allowed_says_so_and_changes_nothing(hub, pipe, token, status):
    message = f"^repo_id must be a repository that your token may write to, got '{REPO}', .* {status}: log in by"
    with pytest.raises(ValueError, match=message):
        pipe.push_to_hub(REPO, token=token)
    assert hub.repositories == {}
    pipe.push_to_hub(REPO)
    before = subjects(hub)
    with pytest.raises(ValueError, match=message):
        pipe.push_to_hub(REPO, token=token, card="# Not mine")
    assert subjects(hub) == before


def test_an_upload_that_breaks_off_commits_nothing(hub, pipe, monkeypatch):
    pipe.push_to_hub(REPO)
    before = dict(hub.repositories[REPO].branches["main"][-1].files)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
        pipe.vae.quant_conv.bias += 1
    put, calls = hub.put_large_file, []

    def put_once(oid: str, content: bytes) -> None:
        calls.append(oid)
        if len(calls) > 1:
            raise Refusal(507)
        put(oid, content)

    monkeypatch.setattr(hub, "put_large_file", put_once)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        pipe.push_to_hub(REPO)
    assert len(calls) > 1
    assert hub.repositories[REPO].branches["main"][-1].files == before


def test_a_card_with_unfit_metadata_is_refused(hub, pipe):
    pipe.push_to_hub(REPO)
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
        pipe.push_to_hub(REPO, card="---\ntags: [unclosed\n---\n")
    assert len(subjects(hub)) == 2


@pytest.mark.parametrize("name", ["mechanic/absent", "no/such/folder", "absent", "with spaces"])
def test_a_checkpoint_that_is_nowhere_is_named(hub, tmp_path, name):
    with pytest.raises(ValueError, match=f"^pretrained_model_name_or_path must be .* got '{name}', which is neither"):
        load(tmp_path, name)
    assert not list(tmp_path.rglob("*.*"))


def test_a_revision_that_does_not_exist_is_named(hub, pipe, tmp_path):
    pipe.push_to_hub(REPO)
    with pytest.raises(ValueError, match=f"^revision must be a branch, tag or commit of '{REPO}', got 'v2'"):
        load(tmp_path, revision="v2")


def test_a_checkpoint_that_was_not_downloaded_is_not_to_be_had_without_the_hub(hub, pipe, tmp_path):
    pipe.push_to_hub(REPO)
    with pytest.raises(ValueError, match=f"got '{REPO}', which is no folder, has not been downloaded before"):
        load(tmp_path, local_files_only=True)


def test_a_repository_of_something_else_is_no_checkpoint(hub, pipe, tmp_path):
    pipe.push_to_hub(REPO)
    del hub.repositories[REPO].branches["main"][-1].files["model_index.json"]
    with pytest.raises(ValueError, match="is no checkpoint: it has no model_index.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "unet/config.json", "model_index.json"])
def test_a_damaged_download_is_named_and_mended_by_another(hub, pipe, tmp_path, name):
    pipe.push_to_hub(REPO)
    load(tmp_path)
    (file,) = (tmp_path / "cache").glob(f"models--*/snapshots/*/{name}")
    file.resolve().write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{re.escape(name)} is .*damaged.* download it again with force_download"):
        load(tmp_path)
    assert torch.equal(sample(load(tmp_path, force_download=True)), sample(pipe))


def test_pickles_of_a_repository_are_not_downloaded(hub, pipe, tmp_path):
    pipe.push_to_hub(REPO)
    hub.repositories[REPO].branches["main"][-1].files["unet/diffusion_pytorch_model.bin"] = b"a pickle"
    load(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))


def test_no_configuration_tells_where_a_part_was_loaded_from(hub, pipe, tmp_path):
    pipe.push_to_hub(REPO)
    load(tmp_path).push_to_hub("mechanic/again")
    for path, content in hub.repositories["mechanic/again"].branches["main"][-1].files.items():
        assert str(tmp_path).encode() not in content, path
        if path.endswith(".json"):
            assert "_name_or_path" not in json.loads(content)
