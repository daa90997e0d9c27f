"""Files that are there whole or not at all, whatever ends the process or the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write"]


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
