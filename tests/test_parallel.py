import sys

import numpy as np
import pytest
import torch

from mechdiffusers import random_composites, simulate
from mechdiffusers.evaluation.inverse_design import refine
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.parallel import num_workers, one_thread, run

SPEC = ResponseSpec(
    "stress",
    ["uniaxial_extension", "shear"],
    [[0.1, 0.2], [0.1, 0.2]],
    units="MPa",
    signed=False,
    solver={"element_order": 1},
)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_work_runs_on_one_thread_and_the_others_come_back():
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == 2


def test_large_work_keeps_its_threads_and_one_thread_stays_one():
    with one_thread(small=False):
        assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("size", "order", "threads"), [(16, 1, 1), (4, 2, 1), (128, 2, 2)])
def test_simulate_takes_one_thread_for_small_designs(size, order, threads, monkeypatch):
    seen = []

    def follow(*arguments: object) -> list:
        seen.append(torch.get_num_threads())
        raise InterruptedError

    monkeypatch.setattr(sys.modules["mechdiffusers.mechanics.simulate"], "follow", follow)
    with pytest.raises(InterruptedError):
        simulate(np.ones((1, size, size)), ["shear"], element_order=order)
    assert seen == [threads]
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_each_process_has_one_thread_and_every_task_is_done():
    assert num_workers() == 2
    found = sorted(run(lambda task: (task, torch.get_num_threads()), range(5), 2))
    assert found == [(task, 1) for task in range(5)]


def test_refined_designs_do_not_depend_on_the_number_of_threads():
    designs, _ = random_composites(3, size=8, seed=0)
    known, _ = random_composites(1, size=8, seed=1)
    target = simulate(known, SPEC.load_cases, SPEC.strains, element_order=1).stress
    threads = []

    def predict(these: np.ndarray) -> np.ndarray:
        threads.append(torch.get_num_threads())
        return np.einsum("bhw,ls->bls", these, np.ones((2, 2)))

    options = {"num_rounds": 2, "num_coarse_steps": 0, "seed": 3}
    by_two = refine(designs, target, SPEC, predict, **options)
    assert threads == [2]  # the check of what it gives; its searches are in processes
    torch.set_num_threads(1)
    by_one = refine(designs, target, SPEC, predict, **options)
    assert np.array_equal(by_two.designs, by_one.designs)
    assert np.array_equal(by_two.error, by_one.error)
    assert (by_one.error[:, -1] < by_one.error[:, 0]).any()  # something was found at all
