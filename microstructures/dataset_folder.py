"""A folder that ``datasets.load_dataset`` opens with its splits: a parquet file each, and a README that names them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from datasets import Dataset

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.mechanics import ResponseSpec

__all__ = ["write_dataset_card", "write_dataset_folder"]


def write_dataset_folder(output_dir: Path, splits: Mapping[str, Dataset]) -> None:
    """Writes splits of a dataset of responses, all of them or nothing.

    Args:
        output_dir: Made, with all files at once.
        splits: Datasets by their names, such as ``train`` and ``heldout``.

    Raises:
        ValueError: If ``output_dir`` exists or cannot be written.
    """
    output_dir = Path(os.path.abspath(output_dir))
    if output_dir.exists():
        raise ValueError(f"output_dir must not exist yet, got {output_dir}: remove it, or name another one")
    unfinished = output_dir.with_name(f".unfinished-{output_dir.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, rows in splits.items():
            rows.to_parquet(unfinished / f"{name}.parquet")
        write_dataset_card(unfinished, ResponseSpec.of(next(iter(splits.values()))), list(splits), output_dir.name)
        os.replace(unfinished, output_dir)
    except OSError as error:
        raise ValueError(f"output_dir must be a folder that can be written, got {output_dir}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_dataset_card(folder: Path, spec: ResponseSpec, splits: Sequence[str], name: str) -> None:
    """Writes the README that names the splits of a folder and says what the responses are."""
    files = [{"split": split, "path": f"{split}.parquet"} for split in splits]
    # datasets caches by what stands here: without the digest it would give the rows of another folder of this name
    contents = b"".join(hashlib.sha256((folder / file["path"]).read_bytes()).digest() for file in files)
    config = {"config_name": "default", "description": hashlib.sha256(contents).hexdigest(), "data_files": files}
    header = {"pretty_name": name, "configs": [config]}
    solver = "mechdiffusers" if spec.solver else "another solver"
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# {name}\n",
        f"Designs with their {spec.quantity} ({spec.units}), by {solver}. `ResponseSpec.of(dataset)` of",
        "`mechdiffusers` reads the specification of the responses.\n",
        "| load case | strains |\n|---|---|",
        *(
            f"| `{case}` | {'-' if spec.is_scalar else ', '.join(f'{strain:g}' for strain in strains)} |"
            for case, strains in zip(spec.load_cases, spec.strains, strict=True)
        ),
    ]
    with atomic_write(folder / "README.md") as unfinished:
        unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
