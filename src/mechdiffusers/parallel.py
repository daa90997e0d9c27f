"""Work in processes of one thread each, and small work on one thread.

Threads of torch spin while they wait for each other. Small operations gain nothing from a second thread, and take up to
fifteen times longer when another program uses one of the cores. Processes of one thread do not wait for each other.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import current_process
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["num_workers", "one_thread", "run"]


@contextlib.contextmanager
def one_thread(small: bool = True) -> Iterator[None]:
    """Runs what is inside on one thread of torch, if it is ``small``; then there are as many threads as before.

    Example:
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    if not small or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def num_workers() -> int:
    """How many processes may share work: as many as torch has threads, where processes can be forked."""
    # a daemon may have no children
    forks = sys.platform == "linux" and not current_process().daemon
    return torch.get_num_threads() if forks else 1


def run(work: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[Any]:
    """Results of tasks as they come, from forked processes of one thread each, or from this process for one worker.

    Args:
        work: Function of a task; what it changes stays in its process.
        tasks: What to do.
        workers: The most processes; see :func:`num_workers`.
    """
    if workers == 1 or len(tasks) == 1:
        return map(work, tasks)
    return iter(
        DataLoader(
            _Tasks(work, tasks),
            batch_size=None,
            num_workers=min(workers, len(tasks)),
            collate_fn=_as_it_is,
            prefetch_factor=1,
            in_order=False,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # the loader draws a seed, which is not to come from the user's generator
        )
    )


def _as_it_is(result: Any) -> Any:
    return result


class _Tasks(Dataset[Any]):
    """Tasks, done as they are taken."""

    def __init__(self, work: Callable[[Any], Any], tasks: Sequence[Any]):
        self._work, self._tasks = work, tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> Any:
        return self._work(self._tasks[index])
