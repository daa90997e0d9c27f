"""Files that are there whole or not at all, whatever ends the process or the machine, and what they may be called."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_write", "checked_file_names"]


@contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Gives a file its name when it is written and on the disk; nothing is left of one that could not be written.

    Args:
        path: The file, replaced if it is there; its folder is made if need be.
        shared: Whether another process may be at the same file, so that each has its own name to write it under. What
            a kill leaves is then not replaced by the next one to write it.

    Yields:
        Another name in the same folder, to write it under.

    Example:
        >>> with atomic_write(Path("metrics.json")) as unfinished:  # doctest: +SKIP
        ...     unfinished.write_text("{}")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{os.getpid()}-" if shared else ""
    unfinished = path.with_name(f".unfinished-{writer}{path.name}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file)  # a crash of the machine may otherwise leave the name without the content
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def checked_file_names(names: Any, num: int, owner: str) -> list[str]:
    """``num`` different names, one for each ``owner``, that all systems allow for files, else a ``ValueError``."""
    chosen = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    fit = all(
        isinstance(name, str) and name.strip(".") and not set(name) & set("/\\\0") and len(os.fsencode(name)) <= 200
        for name in chosen
    )
    if not fit or not len(set(chosen)) == len(chosen) == num:
        raise ValueError(
            f"names must be {num} different names of files, one for each {owner}, got {chosen!r}; 200 bytes are the "
            "most, without / and \\"
        )
    return chosen
