"""Checkpoints that carry their code, so that plain diffusers loads them, from a folder or the Hugging Face Hub.

``DiffusionPipeline.save_pretrained`` writes weights and configurations but no code: a pipeline with classes of its own
cannot be loaded without the package it came from. :class:`PortableCheckpoint` ships the source file of every class of
ours, and points ``model_index.json`` at those files:

    model_index.json    "_class_name": ["pipeline_foo", "FooPipeline"], "encoder": ["foo_encoder", "FooEncoder"]
    pipeline_foo.py     and the sibling files that it imports
    encoder/{foo_encoder.py, config.json, diffusion_pytorch_model.safetensors}

``DiffusionPipeline.from_pretrained(checkpoint, trust_remote_code=True)`` needs nothing else. Where mechdiffusers is
installed, ``FooPipeline.from_pretrained(checkpoint)`` uses the installed classes and runs no code from the checkpoint.
A repository on the Hub is written in one commit and downloaded as a whole before anything of it is loaded.

This file travels inside checkpoints.
"""

import contextlib
import errno
import importlib.util
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from huggingface_hub import (
    ModelCard,
    create_branch,
    create_repo,
    file_exists,
    list_repo_files,
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
from safetensors import SafetensorError, safe_open

__all__ = ["PortableCheckpoint", "claim_repository", "upload_checkpoint"]

_INDEX = DiffusionPipeline.config_name
_CARD = "README.md"
_STOCK = ("diffusers", "transformers")
#: Where our classes are defined: the installed package, or the code of a checkpoint that was loaded by it.
_OURS = ("mechdiffusers", "diffusers_modules")
#: Installed subpackages in which the component files of a checkpoint are looked for by name.
_INSTALLED = ("mechdiffusers.models", "mechdiffusers.schedulers")
#: Entries of an index that are no arguments of the pipeline; the last two are the earlier layout's.
_NO_ARGUMENTS = ("auto_map", "decoder_likelihood", "decoder_scale")
#: Weight files: of the variant ``.fp16`` or of none, whole or one of several shards, or the index of the shards.
_WEIGHTS = (
    re.compile(r"(?P<stem>[^./]+?)(\.(?P<variant>[^./]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)"),
    re.compile(r"(?P<stem>[^./]+?)\.(safetensors|bin)\.index(\.(?P<variant>[^./]+?))?\.json"),
)
#: The files that make a checkpoint; others of a repository are its card, pictures, or pickles.
_PARTS = ["*.json", "*.safetensors", "*.py"]
_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_REMEDY = "save it again, or download it again with force_download=True"
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


class PortableCheckpoint:
    """What a ``DiffusionPipeline`` needs beside itself for its checkpoints to carry their code and hold no pickles.

    A pipeline inherits from it and from ``DiffusionPipeline``, in that order. It is no ``DiffusionPipeline`` itself,
    since diffusers takes the only one that it finds in a file for the custom pipeline.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        include_custom_code: bool = False,
        **push_options: Any,
    ) -> None:
        """Writes weights, configurations and code, aside first; no file is ever half-written.

        Args:
            save_directory: Folder to write to; made if need be. Earlier weights of the same components and variant are
                replaced, files of other names stay.
            safe_serialization: Must be true: these checkpoints are meant for sharing and never hold pickles.
            variant: As in diffusers: weights are saved as ``*.<variant>.safetensors``.
            max_shard_size: As in diffusers.
            push_to_hub: Whether to call :meth:`push_to_hub` once the folder is written.
            use_flashpack: Must be false, for the same reason.
            include_custom_code: Whether to ship the source files of classes that are neither ours nor diffusers' nor
                transformers': whole files, with everything that stands in them. Without it a pipeline of a class
                derived from ours is saved as ours.
            **push_options: Arguments of :meth:`push_to_hub`; ``repo_id`` is the folder's name unless it is given.

        Raises:
            ValueError: If a component's code would have to be shipped and may not or cannot, an option is none of
                these, ``save_directory`` is a file or cannot be written, or as in :meth:`push_to_hub`. Nothing has been
                written then.
        """
        if not safe_serialization or use_flashpack:
            raise ValueError(
                "safe_serialization must be True and use_flashpack False: a checkpoint meant for sharing holds "
                f"safetensors alone, got {safe_serialization!r} and {use_flashpack!r}"
            )
        known = inspect.signature(PortableCheckpoint.push_to_hub).parameters.keys() - {"self"}
        if unknown := sorted(push_options.keys() - known):
            raise ValueError(f"push options must be among {sorted(known)}, got {unknown}")
        if push_options and not push_to_hub:
            raise ValueError(f"push_to_hub must be True where its arguments are given, got {sorted(push_options)}")
        code = _code_of(self, include_custom_code)
        target = Path(save_directory)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and not target.is_dir():
                raise NotADirectoryError(f"{target} is a file")
            staging = Path(tempfile.mkdtemp(prefix=f".unfinished-{target.name}-", dir=target.parent))
        except OSError as error:
            raise ValueError(f"save_directory must be a folder that can be written, got {target}: {error}") from error
        try:
            super().save_pretrained(staging, variant=variant, max_shard_size=max_shard_size)  # type: ignore[misc]
            _ship_code(code, staging)
            _forget_origin(staging)
            before = _files_below(target)
            written = _files_below(staging)
            for name in sorted(written, key=lambda name: name == _INDEX):  # the index last: it names the rest
                _move(staging / name, target / name)
            for name in _stale_weights(before, written):
                (target / name).unlink()
        finally:
            shutil.rmtree(staging)
        if push_to_hub:  # not by the base class, which uploads before the code is there
            options = {"repo_id": target.absolute().name, "include_custom_code": include_custom_code, **push_options}
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
        include_custom_code: bool = False,
    ) -> str:
        """Uploads weights, configurations, code and card to the Hugging Face Hub in one commit.

        Args:
            repo_id: ``"name"`` or ``"owner/name"``; made if need be.
            commit_message: Subject of the commit.
            private: Whether a repository that is made is private; by default as its owner has set it.
            token: Access token; by default that of ``hf auth login`` or of ``HF_TOKEN``.
            create_pr: Whether to open a pull request instead of committing.
            safe_serialization: As in :meth:`save_pretrained`, like ``variant``, ``max_shard_size`` and the last one.
            variant: As in diffusers.
            card: The model card. Without it, a card that the repository has stays, and one that has none gets a card
                that says how to load the checkpoint.
            revision: Branch to commit to, made if need be; the main one by default.
            max_shard_size: As in diffusers.
            include_custom_code: As in :meth:`save_pretrained`.

        Returns:
            Address of the commit.

        Raises:
            ValueError: If ``repo_id`` may not be written to, it exists and is public although ``private`` is set, the
                card's metadata are unfit, or as in :meth:`save_pretrained`. Nothing has been committed then.

        Example:
            >>> pipe.push_to_hub("my-composites", private=True)  # doctest: +SKIP
            'https://huggingface.co/me/my-composites/commit/...'
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(
                folder, safe_serialization, variant, max_shard_size, include_custom_code=include_custom_code
            )
            repo_id = claim_repository(repo_id, private=private, token=token)
            if card is None and not file_exists(repo_id, _CARD, revision=revision, token=token):
                name, pipeline = repo_id.split("/")[-1], _class_to_save(self, include_custom_code).__name__
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
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in diffusers, from safetensors alone, and with each damaged file named.

        Args:
            pretrained_model_name_or_path: Folder of a checkpoint, or its repository on the Hub as ``"owner/name"``.
            **kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``, such as ``dtype``. About the download
                are ``revision`` (a branch, tag or commit), ``token``, ``cache_dir``, ``local_files_only`` and
                ``force_download``.

        Raises:
            ValueError: If there is no such folder, repository or revision, it may not be read, ``use_safetensors`` is
                false, or a JSON or safetensors file is truncated or damaged.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("use_safetensors must be True: no pickle is loaded from a shared checkpoint")
        name = str(pretrained_model_name_or_path)
        options = {option: kwargs.pop(option) for option in _DOWNLOAD_OPTIONS if option in kwargs}
        folder = Path(name if os.path.isdir(name) else _download(name, options))
        index = _checked_index(folder)
        pipe = super().from_pretrained(folder, **kwargs)  # type: ignore[misc]
        pipe.register_to_config(_name_or_path=name)
        pipe._upgrade(index)
        return pipe

    def _upgrade(self, index: dict[str, Any]) -> None:
        """Takes over what an earlier layout kept in the index."""

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """As in diffusers, which switches over no networks but those of the very class that a constructor names.

        Args:
            pipeline: A pipeline whose components this one can take.
            **kwargs: As in diffusers: components and options to take instead.
        """
        expected, _ = cls._get_signature_keys(cls)  # type: ignore[attr-defined]
        taken = {name: component for name, component in pipeline.components.items() if name in expected}
        return super().from_pipe(pipeline, **{**taken, **kwargs})  # type: ignore[misc]

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in diffusers; an installed class sees the installed twins of the files that a checkpoint ships."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("_class_name"), list):  # whose class would take the place of the one that loads
            config["_class_name"] = config["_class_name"][1]
        if not __name__.startswith("mechdiffusers."):
            return loaded
        for value in config.values():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0].isidentifier():
                installed = (f"{subpackage}.{value[0]}" for subpackage in _INSTALLED)
                value[0] = next((module for module in installed if importlib.util.find_spec(module)), value[0])
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in diffusers, without warnings of the entries of an index that are no arguments."""
        arguments = {name: value for name, value in config_dict.items() if name not in _NO_ARGUMENTS}
        return super().extract_init_dict(arguments, **kwargs)  # type: ignore[misc]


def claim_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Makes a repository on the Hub unless it exists; arguments and errors as in ``push_to_hub``.

    Returns:
        ``"owner/name"``.
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
    """Uploads a folder that ``save_pretrained`` has written, a card and pictures in it too, in one commit.

    Earlier weights of the same components and variants are deleted by that commit. Arguments and errors are those of
    ``push_to_hub``; ``repo_id`` is from :func:`claim_repository`.

    Returns:
        Address of the commit.
    """
    with _refusals_explained(repo_id):
        if revision is not None:
            create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        there = list_repo_files(repo_id, revision=revision, token=token)
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            token=token,
            create_pr=create_pr,
            revision=revision,
            delete_patterns=_stale_weights(there, _files_below(Path(folder))) or None,
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


def _class_to_save(pipe: Any, include_custom_code: bool) -> type:
    """The class that a checkpoint of a pipeline names: its own, or the one of ours that it is derived from."""
    ours = (cls for cls in type(pipe).__mro__ if cls.__module__.split(".")[0] in _OURS)
    return type(pipe) if include_custom_code else next(ours, type(pipe))


def _code_of(pipe: Any, include_custom_code: bool) -> dict[str, tuple[type, list[Path]]]:
    """What is to be shipped with a pipeline, ``""``, and with its components: the class, and its source files."""
    classes = {"": _class_to_save(pipe, include_custom_code)}
    for name, component in pipe.components.items():
        cls = type(getattr(component, "_orig_mod", component))  # what torch.compile wraps
        if component is not None and cls.__module__.split(".")[0] not in _STOCK:
            classes[name] = cls
    code = {}
    for name, cls in classes.items():
        what = f"component {name!r}" if name else "pipeline"
        try:
            source = Path(inspect.getfile(cls))
            is_there = source.is_file()
        except (TypeError, OSError):
            is_there = False
        if not is_there:
            raise ValueError(
                f"{what} must have a class whose source file can be shipped, got {cls.__name__} without one: define it "
                "in a file of its own"
            )
        if cls.__module__.split(".")[0] not in _OURS and not include_custom_code:
            raise ValueError(
                f"{what} must have a class of mechdiffusers, diffusers or transformers, got {cls.__name__}: "
                f"include_custom_code=True ships {source}, with everything that stands in it"
            )
        code[name] = (cls, [source, *(source.parent / f"{name}.py" for name in get_relative_imports(source))])
    return code


def _ship_code(code: dict[str, tuple[type, list[Path]]], folder: Path) -> None:
    """Copies source files into a checkpoint and points its index at them."""
    index = json.loads((folder / _INDEX).read_text())
    for name, (cls, sources) in code.items():
        for source in sources:
            shutil.copyfile(source, folder / name / source.name)
        index[name or "_class_name"] = [sources[0].stem, cls.__name__]
        if getattr(cls, "_auto_class", None) is not None:  # AutoModel reads one class a repository, from its index
            index.setdefault("auto_map", {cls._auto_class: f"{sources[0].stem}.{cls.__name__}"})  # type: ignore[attr-defined]
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _forget_origin(folder: Path) -> None:
    """Takes the place that a part was loaded from out of its configuration: a path of the machine it was made on."""
    for path in (folder / _INDEX, *folder.glob("*/*config.json")):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _files_below(folder: Path) -> list[str]:
    """The files of a checkpoint's root and components, by their names below it."""
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]


def _stale_weights(there: Iterable[str], written: Iterable[str]) -> list[str]:
    """Weight files that are there of the components and variants of those written, but are none of them."""

    def kind(name: str) -> tuple[str, str | None] | None:
        folder, _, file = name.rpartition("/")
        found = next((match for match in (pattern.fullmatch(file) for pattern in _WEIGHTS) if match), None)
        return (folder, found["variant"]) if found else None

    written = set(written)
    replaced = {kind(name) for name in written} - {None}
    return [name for name in there if name not in written and kind(name) in replaced]


def _move(source: Path, target: Path) -> None:
    """Puts a file in its place in one step, on another file system too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f".unfinished-{target.name}")
        shutil.copyfile(source, beside)
        os.replace(beside, target)


def _checked_index(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint; a ``ValueError`` names the first of its files that is missing or damaged."""
    if not (folder / _INDEX).is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {_INDEX}, which save_pretrained writes")
    for path in [folder / _INDEX, *sorted(folder.glob("*/*config.json"))]:
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged, not JSON: {error}; {_REMEDY}") from error
        if not (isinstance(content, dict) and "_class_name" in content):
            raise ValueError(
                f"{path} is damaged: it must be a mapping with a _class_name, as save_pretrained writes it"
            )
    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged: {error}; {_REMEDY}") from error
    return json.loads((folder / _INDEX).read_text())
