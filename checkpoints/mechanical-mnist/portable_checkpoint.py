"""Checkpoints that carry their code, so that plain diffusers loads them.

``DiffusionPipeline.save_pretrained`` writes weights and configurations but no code: a pipeline with classes of its own
cannot be loaded without the package it came from. :class:`PortableCheckpoint` ships the source file of every class
that is neither diffusers' nor transformers', and points ``model_index.json`` at those files:

    model_index.json    "_class_name": ["pipeline_foo", "FooPipeline"], "encoder": ["foo_encoder", "FooEncoder"]
    pipeline_foo.py     and the sibling files that it imports
    encoder/{foo_encoder.py, config.json, diffusion_pytorch_model.safetensors}

``DiffusionPipeline.from_pretrained(checkpoint, trust_remote_code=True)`` needs nothing else. Where mechdiffusers is
installed, ``FooPipeline.from_pretrained(checkpoint)`` uses the installed classes and runs no code from the checkpoint.

This file travels inside checkpoints.
"""

import importlib.util
import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from safetensors import SafetensorError, safe_open

__all__ = ["PortableCheckpoint"]

_INDEX = DiffusionPipeline.config_name
#: Installed packages in which a shipped component file is looked for by its name.
_INSTALLED_ROOMS = ("mechdiffusers.models", "mechdiffusers.schedulers")
_REMEDY = "save it again, or download it again with force_download=True"


class PortableCheckpoint(DiffusionPipeline):
    """A ``DiffusionPipeline`` whose checkpoints ship their code and hold no pickles."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Writes weights, configurations and code, aside first; no file is ever half-written.

        Args:
            save_directory: Folder to write to; made if need be. Files of other names in it stay.
            safe_serialization: Must be true: these checkpoints are meant for sharing and never hold pickles.
            variant: As in diffusers: weights are saved as ``*.<variant>.safetensors``.
            max_shard_size: As in diffusers.

        Raises:
            ValueError: If ``safe_serialization`` is false, or ``save_directory`` is a file or cannot be written.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be True: a checkpoint meant for sharing holds no pickles")
        target = Path(save_directory)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and not target.is_dir():
                raise NotADirectoryError(f"{target} is a file")
            staging = Path(tempfile.mkdtemp(prefix=f".unfinished-{target.name}-", dir=target.parent))
        except OSError as error:
            raise ValueError(f"save_directory must be a folder that can be written, got {target}: {error}") from error
        try:
            super().save_pretrained(staging, variant=variant, max_shard_size=max_shard_size)
            self._ship_code(staging)
            _forget_origin(staging)
            written = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
            for path in sorted(written, key=lambda path: path.name == _INDEX):  # the index last: it names the rest
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / path, target / path)
        finally:
            shutil.rmtree(staging)

    def _ship_code(self, folder: Path) -> None:
        """Copies the source files of our classes into a checkpoint and points its index at them."""
        index = json.loads((folder / _INDEX).read_text())
        index["_class_name"] = [_copy_source(type(self), folder), type(self).__name__]
        for name, component in self.components.items():
            if component is not None and type(component).__module__.split(".")[0] not in ("diffusers", "transformers"):
                index[name] = [_copy_source(type(component), folder / name), type(component).__name__]
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in diffusers; an installed class sees the installed twins of the files that a checkpoint ships."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        if cls.__module__.split(".")[0] != "mechdiffusers":
            return loaded
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config["_class_name"], list):
            config["_class_name"] = config["_class_name"][1]
        for value in config.values():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
                installed = (f"{room}.{value[0]}" for room in _INSTALLED_ROOMS)
                value[0] = next((module for module in installed if importlib.util.find_spec(module)), value[0])
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "PortableCheckpoint":
        """As in diffusers, from safetensors alone, and with each damaged file named.

        Args:
            pretrained_model_name_or_path: Folder of a checkpoint.
            **kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``, such as ``dtype``.

        Raises:
            ValueError: If ``use_safetensors`` is false, or the folder has no ``model_index.json``, or a JSON or
                safetensors file in it is truncated or damaged.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("use_safetensors must be True: no pickle is loaded from a shared checkpoint")
        _check_files(Path(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


def _copy_source(cls: type, folder: Path) -> str:
    """Copies the file that defines ``cls``, and the siblings it imports, into ``folder``; returns the file's stem."""
    source = Path(inspect.getfile(cls))
    for path in (source, *(source.parent / f"{sibling}.py" for sibling in get_relative_imports(source))):
        shutil.copyfile(path, folder / path.name)
    return source.stem


def _forget_origin(folder: Path) -> None:
    """Takes the place that a part was loaded from out of its configuration: a path of the machine it was made on."""
    for path in (folder / _INDEX, *folder.glob("*/*config.json")):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_files(folder: Path) -> None:
    """Raises a ``ValueError`` that names the first missing or damaged file of a checkpoint."""
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
