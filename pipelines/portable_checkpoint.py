"""Checkpoints that carry their code, so that plain diffusers loads them, from a folder or the Hugging Face Hub.

``DiffusionPipeline.save_pretrained`` writes no code: a pipeline with classes of its own cannot be loaded without its
package. :class:`PortableCheckpoint` ships the source file of every class of ours, and names it in ``model_index.json``:

    model_index.json    "_class_name": ["pipeline_foo", "FooPipeline"], "encoder": ["foo_encoder", "FooEncoder"]
    pipeline_foo.py     and the sibling files that it imports
    encoder/{foo_encoder.py, config.json, diffusion_pytorch_model.safetensors}

``DiffusionPipeline.from_pretrained(checkpoint, trust_remote_code=True)`` needs nothing else. Where mechdiffusers is
installed, ``FooPipeline.from_pretrained(checkpoint)`` uses the installed classes and runs no code from the checkpoint.
A repository on the Hub is written in one commit and downloaded as a whole before anything of it is loaded.

This file travels inside checkpoints.
"""

import contextlib
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
    errors,
    file_exists,
    model_info,
    snapshot_download,
    upload_folder,
)
from safetensors import SafetensorError, safe_open

__all__ = ["PortableCheckpoint", "claim_repository", "upload_checkpoint"]

_INDEX = DiffusionPipeline.config_name
_CARD = "README.md"
_STOCK = ("diffusers", "transformers")
_OURS = ("mechdiffusers", "diffusers_modules")  #: The installed package, or the code of a loaded checkpoint.
#: Installed subpackages with the component files of checkpoints.
_INSTALLED = ("mechdiffusers.models", "mechdiffusers.schedulers")
#: Entries of an index that are no arguments of the pipeline; the last two are from the earlier layout.
_NO_ARGUMENTS = ("auto_map", "decoder_likelihood", "decoder_scale")
#: Weight files: of the variant ``.fp16`` or of none, whole or one of several shards, or the index of the shards.
_WEIGHTS = (
    re.compile(r"(?P<stem>[^./]+?)(\.(?P<variant>[^./]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)"),
    re.compile(r"(?P<stem>[^./]+?)\.(safetensors|bin)\.index(\.(?P<variant>[^./]+?))?\.json"),
)
#: The files that make a checkpoint, a tokenizer's among them; others are its card, pictures, or pickles.
_PARTS = ["*.json", "*.safetensors", "*.py", "*.txt", "*.model"]
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
    """Makes the checkpoints of a ``DiffusionPipeline`` carry their code and hold no pickles.

    A pipeline inherits from it and from ``DiffusionPipeline``, in that order. It is no ``DiffusionPipeline`` itself:
    diffusers takes the only one in a file for the custom pipeline.
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
        """Writes weights, configurations and code; no file is ever half-written.

        Args:
            save_directory: Folder to write to, made if need be. Earlier weights of the same components and variant are
                replaced, other files stay.
            safe_serialization: Must be true: a shared checkpoint never holds pickles.
            variant: As in diffusers: weights are saved as ``*.<variant>.safetensors``.
            max_shard_size: As in diffusers.
            push_to_hub: Whether to call :meth:`push_to_hub` afterwards.
            use_flashpack: Must be false, for the same reason.
            include_custom_code: Whether to ship the whole source files of classes that are neither ours nor diffusers'
                nor transformers'. Without it, a pipeline of a class derived from ours is saved as ours.
            **push_options: Arguments of :meth:`push_to_hub`; ``repo_id`` is the folder's name by default.

        Raises:
            ValueError: If a component's code may not or cannot be shipped, an option is unknown, ``save_directory`` is
                a file or cannot be written, all before anything is written, or as in :meth:`push_to_hub`.
        """
        if not safe_serialization or use_flashpack:
            accepted = "True and use_flashpack False: a checkpoint meant for sharing holds safetensors alone"
            raise ValueError(f"safe_serialization must be {accepted}, got {safe_serialization!r} and {use_flashpack!r}")
        known = inspect.signature(PortableCheckpoint.push_to_hub).parameters.keys() - {"self"}
        if unknown := sorted(push_options.keys() - known):
            raise ValueError(f"push options must be among {sorted(known)}, got {unknown}")
        if push_options and not push_to_hub:
            raise ValueError(f"push_to_hub must be True where its arguments are given, got {sorted(push_options)}")
        code = _code_of(self, include_custom_code)
        target = Path(save_directory)
        try:
            target.mkdir(parents=True, exist_ok=True)
            before = _files_below(target)
            staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target))
        except OSError as error:
            raise ValueError(f"save_directory must be a folder that can be written, got {target}: {error}") from error
        try:
            super().save_pretrained(staging, variant=variant, max_shard_size=max_shard_size)  # type: ignore[misc]
            _ship_code(code, staging)
            _forget_origin(staging)
            written = _files_below(staging)
            for name in sorted(written, key=lambda name: name == _INDEX):  # the index last: it names the rest
                (target / name).parent.mkdir(exist_ok=True)
                os.replace(staging / name, target / name)
            for name in _stale_weights(before, written):
                (target / name).unlink()
        finally:
            shutil.rmtree(staging)
            with contextlib.suppress(OSError):  # it has files, unless nothing could be saved
                target.rmdir()
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
            repo_id: ``"name"`` or ``"owner/name"``, made if need be.
            commit_message: Subject of the commit.
            private: Whether a new repository is private; by default as its owner has set it.
            token: Access token, by default that of ``hf auth login`` or of ``HF_TOKEN``.
            create_pr: Whether to open a pull request instead of committing.
            safe_serialization: As in :meth:`save_pretrained`.
            variant: As in :meth:`save_pretrained`.
            card: The model card. Without it, an existing card stays; otherwise a card says how to load the checkpoint.
            revision: Branch to commit to, made if need be; the main one by default.
            max_shard_size: As in :meth:`save_pretrained`.
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
            repo_id = claim_repository(repo_id, private=private, token=token, revision=revision)
            if card is None and not file_exists(repo_id, _CARD, revision=revision, token=token):
                name, pipeline = repo_id.split("/")[-1], _class_to_save(self, include_custom_code).__name__
                card = _PLAIN_CARD.format(name=name, repo_id=repo_id, pipeline=pipeline)
            if card is not None:
                (Path(folder) / _CARD).write_text(str(card), encoding="utf-8")
            subject = commit_message or f"Upload {type(self).__name__}"
            options: dict[str, Any] = {"token": token, "create_pr": create_pr, "revision": revision}
            return upload_checkpoint(folder, repo_id, commit_message=subject, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in diffusers, but from safetensors alone, and naming a damaged file.

        Args:
            pretrained_model_name_or_path: Folder of a checkpoint, or its repository on the Hub as ``"owner/name"``.
            **kwargs: Arguments of ``DiffusionPipeline.from_pretrained``, such as ``dtype``. For a download: ``token``,
                ``revision`` (branch, tag or commit), ``cache_dir``, ``local_files_only`` and ``force_download``.

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
        """As in diffusers, but with all components of ``pipeline`` that the constructor takes, of any class."""
        expected, _ = cls._get_signature_keys(cls)  # type: ignore[attr-defined]
        taken = {name: component for name, component in pipeline.components.items() if name in expected}
        return super().from_pipe(pipeline, **{**taken, **kwargs})  # type: ignore[misc]

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in diffusers, but an installed class uses installed modules instead of those of the checkpoint."""
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
        """As in diffusers, without warnings about entries of an index that are no arguments."""
        arguments = {name: value for name, value in config_dict.items() if name not in _NO_ARGUMENTS}
        return super().extract_init_dict(arguments, **kwargs)  # type: ignore[misc]


def claim_repository(
    repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
) -> str:
    """Makes a repository and branch on the Hub unless they exist: its ``"owner/name"``, as in ``push_to_hub``."""
    with _refusals_explained(repo_id):
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if private and not model_info(repo_id, token=token).private:
            remedy = "choose another name, or make it private in its settings first"
            raise ValueError(f"private must be left out for {repo_id!r}, which exists and is public: {remedy}")
        if revision is not None:
            create_branch(repo_id, branch=revision, token=token, exist_ok=True)
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
    """Uploads a folder that ``save_pretrained`` has written, with any card and pictures, in one commit: its address.

    The commit deletes earlier weights of the same components and variants. Arguments and errors are as in
    ``push_to_hub``; ``repo_id`` is from :func:`claim_repository`.
    """
    with _refusals_explained(repo_id):
        there = [file.rfilename for file in model_info(repo_id, revision=revision, token=token).siblings or []]
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            token=token,
            create_pr=create_pr,
            revision=revision,
            ignore_patterns=".unfinished-*",  # what a kill has left
            delete_patterns=_stale_weights(there, _files_below(Path(folder))) or None,
        )
    return commit.commit_url


@contextlib.contextmanager
def _refusals_explained(repo_id: str) -> Iterator[None]:
    """Turns the Hub's refusal to write into a ``ValueError``; other errors pass."""
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (401, 403, 404):
            raise
        got = f"{repo_id!r}, refused with status {status}"
        remedy = "log in by `hf auth login` with a token that has write permission, or set HF_TOKEN"
        raise ValueError(f"repo_id must be a repository that your token may write to, got {got}: {remedy}") from error


def _download(repo_id: str, options: dict[str, Any]) -> str:
    """The folder of a checkpoint of the Hub, downloaded unless it is in the cache."""
    try:
        return snapshot_download(repo_id, allow_patterns=_PARTS, **options)
    except errors.RevisionNotFoundError as error:
        revision = options["revision"]
        raise ValueError(f"revision must be a branch, tag or commit of {repo_id!r}, got {revision!r}") from error
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            why = "which is no folder, has not been downloaded before, and cannot be had from the Hub now"
        elif isinstance(error, (errors.HFValidationError, errors.RepositoryNotFoundError)):
            why = "which is neither, or private and not for your token (`hf auth login`)"
        else:
            why = f"which the Hub refused with status {error.response.status_code}"
        accepted = "a folder or a repository on the Hub"
        raise ValueError(f"pretrained_model_name_or_path must be {accepted}, got {repo_id!r}, {why}") from error


def _class_to_save(pipe: Any, include_custom_code: bool) -> type:
    """The class that a checkpoint names: the pipeline's own, or that of ours from which it is derived."""
    ours = (cls for cls in type(pipe).__mro__ if cls.__module__.split(".")[0] in _OURS)
    return type(pipe) if include_custom_code else next(ours, type(pipe))


def _code_of(pipe: Any, include_custom_code: bool) -> dict[str, tuple[type, list[Path]]]:
    """The class and its source files for each component of a pipeline, and for the pipeline, ``""``."""
    classes = {"": _class_to_save(pipe, include_custom_code)}
    for name, component in pipe.components.items():
        cls = type(getattr(component, "_orig_mod", component))  # what torch.compile wraps
        if component is not None and cls.__module__.split(".")[0] not in _STOCK:
            classes[name] = cls
    code = {}
    for name, cls in classes.items():
        what = f"component {name!r}" if name else "pipeline"
        is_there = False
        with contextlib.suppress(TypeError, OSError):
            source = Path(inspect.getfile(cls))
            is_there = source.is_file()
        if not is_there:
            got = f"{cls.__name__} without one: define it in a file of its own"
            raise ValueError(f"{what} must have a class whose source file can be shipped, got {got}")
        if cls.__module__.split(".")[0] not in _OURS and not include_custom_code:
            got = f"{cls.__name__}: include_custom_code=True ships {source}, with everything that stands in it"
            raise ValueError(f"{what} must have a class of mechdiffusers, diffusers or transformers, got {got}")
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
    """Removes the path that a part was loaded from, on this machine, from its configuration."""
    for path in (folder / _INDEX, *folder.glob("*/*config.json")):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _files_below(folder: Path) -> list[str]:
    """The files of a checkpoint's root and components, by their names below it."""
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]


def _stale_weights(there: Iterable[str], written: Iterable[str]) -> list[str]:
    """Earlier weight files of the names and variants that were written."""

    def kind(name: str) -> tuple[str, str, str | None] | None:
        folder, _, file = name.rpartition("/")
        found = next((match for match in (pattern.fullmatch(file) for pattern in _WEIGHTS) if match), None)
        return (folder, found["stem"], found["variant"]) if found else None

    written = set(written)
    replaced = {kind(name) for name in written} - {None}
    return [name for name in there if name not in written and kind(name) in replaced]


def _checked_index(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint; a ``ValueError`` names the first of its files that is missing or damaged."""
    if not (folder / _INDEX).is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {_INDEX}, which save_pretrained writes")
    index: dict[str, Any] = {}
    for path in [folder / _INDEX, *sorted(folder.glob("*/*config.json"))]:
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged, not JSON: {error}; {_REMEDY}") from error
        of_transformers = index.get(path.parent.name, [None])[0] == "transformers"  # which writes no _class_name
        if not isinstance(content, dict) or not ("_class_name" in content or of_transformers):
            accepted = "a mapping with a _class_name, as save_pretrained writes it"
            raise ValueError(f"{path} is damaged: it must be {accepted}")
        index = index or content
    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged: {error}; {_REMEDY}") from error
    return index
