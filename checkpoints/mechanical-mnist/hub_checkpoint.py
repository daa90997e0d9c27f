"""Checkpoints on the Hugging Face Hub.

A repository on the Hub holds the files that ``save_pretrained`` writes, and a model card. It is written in one commit,
so that no one ever loads half of an upload, and downloaded as a whole before anything of it is loaded, so that what
holds for the files of a folder holds for those of a download.

This file travels inside checkpoints.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import (
    ModelCard,
    create_branch,
    create_repo,
    file_exists,
    model_info,
    snapshot_download,
    upload_folder,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ["HubCheckpoint", "claim_repository", "upload_checkpoint"]

_CARD = "README.md"
#: The files that make a checkpoint; others of a repository are its card, pictures, or pickles.
_PARTS = ["*.json", "*.safetensors", "*.py"]
#: Arguments of ``from_pretrained`` that are about the download.
_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
#: The card of a checkpoint that is pushed without one.
_PLAIN_CARD = """---
library_name: diffusers
---

# {name}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True, use_safetensors=True)
```

With `mechdiffusers` installed, `{pipeline}.from_pretrained("{repo_id}")` runs no code from this repository.
"""


class HubCheckpoint(DiffusionPipeline):
    """A ``DiffusionPipeline`` that is pushed to the Hub as its ``save_pretrained`` writes it, and loaded from there."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **push_options: Any,
    ) -> None:
        """As in :class:`PortableCheckpoint`, and pushed to the Hub behind that if wanted.

        Args:
            save_directory: Folder to write to.
            safe_serialization: Must be true.
            variant: As in diffusers.
            max_shard_size: As in diffusers.
            push_to_hub: Whether to call :meth:`push_to_hub` once the folder is written.
            **push_options: Arguments of that; ``repo_id`` is the folder's name unless it is given.

        Raises:
            ValueError: As in :class:`PortableCheckpoint` and :meth:`push_to_hub`, or if there are ``push_options``
                without ``push_to_hub``.
        """
        if push_options and not push_to_hub:
            raise ValueError(f"push_to_hub must be True where its arguments are given, got {sorted(push_options)}")
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size)
        if push_to_hub:  # not by the base class, which uploads before the code is there
            options = {"repo_id": Path(save_directory).absolute().name, **push_options}
            self.push_to_hub(variant=variant, max_shard_size=max_shard_size, **options)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        *,
        card: ModelCard | str | None = None,
        revision: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> str:
        """Uploads weights, configurations, code and card to the Hugging Face Hub in one commit.

        Args:
            repo_id: ``"name"`` or ``"owner/name"``; made if need be.
            commit_message: Subject of the commit.
            private: Whether a repository that is made is private; by default as its owner has set it.
            token: Access token; by default that of ``hf auth login`` or of ``HF_TOKEN``.
            create_pr: Whether to open a pull request instead of committing.
            safe_serialization: Must be true, as in :meth:`save_pretrained`.
            variant: As in diffusers.
            card: The model card. Without it, a card that the repository has stays, and one that has none gets a card
                that says how to load the checkpoint.
            revision: Branch to commit to, made if need be; the main one by default.
            max_shard_size: As in diffusers.

        Returns:
            Address of the commit.

        Raises:
            ValueError: If ``repo_id`` may not be written to, or it exists and is public although ``private`` is set, or
                the card's metadata are unfit. Nothing has been committed then.

        Example:
            >>> pipe.push_to_hub("my-composites", private=True)  # doctest: +SKIP
            'https://huggingface.co/me/my-composites/commit/...'
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            repo_id = claim_repository(repo_id, private=private, token=token)
            if card is None and not file_exists(repo_id, _CARD, revision=revision, token=token):
                name, pipeline = repo_id.split("/")[-1], type(self).__name__
                card = _PLAIN_CARD.format(name=name, repo_id=repo_id, pipeline=pipeline)
            if card is not None:
                (Path(folder) / _CARD).write_text(str(card), encoding="utf-8")
            return upload_checkpoint(
                folder,
                repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                token=token,
                create_pr=create_pr,
                revision=revision,
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "HubCheckpoint":
        """As in :class:`PortableCheckpoint`, from the Hub too.

        Args:
            pretrained_model_name_or_path: Folder of a checkpoint, or its repository on the Hub as ``"owner/name"``.
            **kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``, such as ``dtype``. About the download
                are ``revision`` (a branch, tag or commit), ``token``, ``cache_dir``, ``local_files_only`` and
                ``force_download``.

        Raises:
            ValueError: If there is no such folder, repository or revision, or it may not be read; otherwise as in
                :class:`PortableCheckpoint`.
        """
        name = str(pretrained_model_name_or_path)
        options = {option: kwargs.pop(option) for option in _DOWNLOAD_OPTIONS if option in kwargs}
        pipe = super().from_pretrained(name if os.path.isdir(name) else _download(name, options), **kwargs)
        pipe.register_to_config(_name_or_path=name)
        return pipe


def claim_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Makes a repository on the Hub unless it exists.

    Args:
        repo_id: ``"name"`` or ``"owner/name"``.
        private: Whether it is made private; by default as its owner has set it.
        token: Access token; by default that of ``hf auth login`` or of ``HF_TOKEN``.

    Returns:
        ``"owner/name"``.

    Raises:
        ValueError: If the token may not make it, or it exists and is public although ``private`` is set.
    """
    with _refusals_explained(repo_id):
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if private and not model_info(repo_id, token=token).private:
            raise ValueError(
                f"private must be left out for {repo_id!r}, which exists and is public: choose another name, or make "
                "it private in its settings first"
            )
    return repo_id


def upload_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str,
    token: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Uploads a folder that ``save_pretrained`` has written to a repository on the Hub, in one commit.

    Args:
        folder: All its files are uploaded, a card and pictures too.
        repo_id: ``"owner/name"``, from :func:`claim_repository`.
        commit_message: Subject of the commit.
        token: Access token; by default that of ``hf auth login`` or of ``HF_TOKEN``.
        create_pr: Whether to open a pull request instead of committing.
        revision: Branch to commit to, made if need be; the main one by default.

    Returns:
        Address of the commit.

    Raises:
        ValueError: If the token may not write to the repository, or the card's metadata are unfit. Nothing has been
            committed then.
    """
    with _refusals_explained(repo_id):
        if revision is not None:
            create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            token=token,
            create_pr=create_pr,
            revision=revision,
        )
    return commit.commit_url


@contextlib.contextmanager
def _refusals_explained(repo_id: str) -> Iterator[None]:
    """Turns the Hub's refusal to write into a ``ValueError``; other failures stay what they are."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (401, 403, 404):
            raise
        raise ValueError(
            f"repo_id must be a repository that your token may write to, got {repo_id!r}, refused with status "
            f"{status}: log in by `hf auth login` with a token that has write permission, or set HF_TOKEN"
        ) from error


def _download(repo_id: str, options: dict[str, Any]) -> str:
    """The folder of a checkpoint of the Hub, downloaded unless it is in the cache."""
    try:
        return snapshot_download(repo_id, allow_patterns=_PARTS, **options)
    except RevisionNotFoundError as error:
        revision = options["revision"]
        raise ValueError(f"revision must be a branch, tag or commit of {repo_id!r}, got {revision!r}") from error
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            why = "which is no folder, has not been downloaded before, and cannot be had from the Hub now"
        elif isinstance(error, (HFValidationError, RepositoryNotFoundError)):
            why = "which is neither, or private and not for your token (`hf auth login`)"
        else:
            why = f"which the Hub refused with status {error.response.status_code}"
        raise ValueError(
            f"pretrained_model_name_or_path must be a folder or a repository on the Hub, got {repo_id!r}, {why}"
        ) from error
