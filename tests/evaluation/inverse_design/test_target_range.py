"""Synthetic reach: curves of two load cases with three degrees of freedom, in a bounded range."""

import math
import warnings

import numpy as np
import pytest
import torch

from mechdiffusers.evaluation.inverse_design import OutOfRangeWarning, TargetRange, response_error

STRAINS = np.linspace(0.1, 0.6, 6)


def curves(num: int, seed: int, stiffness: tuple[float, float] = (0.0, 3.0)) -> np.ndarray:
    """Two curves each: moduli within a factor of two of each other, hardening in common."""
    rng = np.random.default_rng(seed)
    modulus = np.exp(rng.uniform(*stiffness, num))
    moduli = np.stack([modulus, modulus * np.exp(rng.uniform(-0.7, 0.7, num))], 1)
    hardening = rng.uniform(0.5, 1.5, (num, 1, 1))
    return moduli[..., None] * (STRAINS + hardening * STRAINS**2)


def softening(targets: np.ndarray) -> np.ndarray:
    fallen = targets.copy()
    fallen[:, 0, 4:] = 0.8 * targets[:, 0, 3:4]
    return fallen


def contradictory(targets: np.ndarray) -> np.ndarray:
    return targets * np.array([1.0, 30.0])[:, None]


IMPOSSIBLE = {
    "too stiff": lambda targets: 3 * targets * np.exp(3) / targets[:, :1, :1] * STRAINS[0],
    "too soft": lambda targets: 0.3 * targets / targets[:, :1, :1] * STRAINS[0],
    "softening": softening,
    "contradictory": contradictory,
}


@pytest.fixture(scope="module")
def reach() -> TargetRange:
    return TargetRange(curves(1500, seed=0), curves(300, seed=1))


def test_a_p_value_is_seldom_small_where_targets_are_as_the_held_out_ones(reach):
    p_value = reach.check(curves(800, seed=2), level=0).p_value
    for level in (0.05, 0.2, 0.5):
        assert np.mean(p_value <= level) <= level + 3 * math.sqrt(level * (1 - level) * (1 / 800 + 1 / 300))


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_impossible_targets_are_told_from_possible_ones(reach, kind):
    possible, impossible = (
        reach.check(targets, level=0).p_value for targets in (curves(200, 3), IMPOSSIBLE[kind](curves(200, 4)))
    )
    smaller = (impossible[:, None] < possible).mean() + (impossible[:, None] == possible).mean() / 2
    assert smaller > 0.99  # the area under the receiver operating characteristic


def test_a_stiffness_out_of_range_shows_in_the_nearest_design_and_a_kink_in_the_shape(reach):
    inside = reach.check(curves(100, 3), level=0)
    stiff, fallen = (reach.check(IMPOSSIBLE[kind](curves(100, 3)), level=0) for kind in ("too stiff", "softening"))
    assert stiff.nearest_error.min() > inside.nearest_error.max()
    assert fallen.shape_distance.min() > inside.shape_distance.max()


def test_noise_within_the_tolerance_does_not_put_a_target_out_of_range():
    training, heldout = curves(600, seed=0), curves(300, seed=1)
    noisy = curves(200, 3) * np.exp(0.002 * np.random.default_rng(0).standard_normal((200, 2, 6)))
    flagged = [
        np.mean(TargetRange(training, heldout, tolerance).check(noisy, level=0).p_value < 0.05)
        for tolerance in (0.01, 0.0001)
    ]
    assert flagged[0] < 0.12
    assert flagged[1] > 0.9


def test_what_is_left_open_is_not_held_against_a_target(reach):
    wrong = contradictory(curves(50, 3))
    wrong[:, 1] = math.nan
    assert np.mean(reach.check(wrong, level=0).p_value < 0.05) < 0.2
    assert (reach.check(contradictory(curves(50, 3)), level=0).p_value < 0.05).all()


def test_the_nearest_error_is_that_of_retrieval_also_for_tensors_with_gradients(reach):
    targets, training = torch.from_numpy(curves(5, 3)), curves(1500, seed=0)
    nearest = [response_error(training, target.numpy()).min() for target in targets]
    np.testing.assert_allclose(reach.check(targets.requires_grad_(), level=0).nearest_error, nearest)


def test_a_target_out_of_range_is_warned_of_by_its_name_and_one_within_is_not(reach):
    targets = np.concatenate([curves(1, 3), contradictory(curves(1, 3))])
    with pytest.warns(OutOfRangeWarning, match=r"targets wild \(p = "):
        check = reach.check(targets, names=["tame", "wild"])
    np.testing.assert_array_equal(check.out_of_range, [False, True])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reach.check(targets[:1])


@pytest.mark.parametrize(("num", "tells"), [(199, False), (200, True)])
def test_too_few_held_out_designs_to_call_anything_out_of_range_are_warned_of(num, tells):
    reach = TargetRange(curves(300, seed=0), curves(num, seed=1))
    message = "targets 0 " if tells else rf"targets cannot be told .* takes 200 held-out designs .* there are {num}$"
    with pytest.warns(OutOfRangeWarning, match=message):
        check = reach.check(1e3 * curves(1, 3))
    assert check.out_of_range.item() == tells


def test_unsolved_designs_reach_nothing():
    training, heldout = curves(300, seed=0), curves(100, seed=1)
    unsolved = contradictory(training)
    unsolved[:, 1, -1] = math.nan
    both = TargetRange(np.concatenate([training, unsolved]), heldout)
    targets = curves(20, 3)
    np.testing.assert_allclose(
        both.check(targets, level=0).p_value, TargetRange(training, heldout).check(targets, level=0).p_value
    )


def test_designs_of_which_no_one_is_wholly_known_tell_what_lies_in_reach():
    """One load case was measured of each: that says as much of targets in one load case as whole designs would."""
    training, heldout = curves(1000, seed=0), curves(600, seed=1)
    halves = [values.copy() for values in (training, heldout)]
    for values in halves:
        values[::2, 0] = values[1::2, 1] = math.nan
    reach, whole = TargetRange(*halves), TargetRange(training[1::2], heldout[1::2])
    targets = np.concatenate([curves(20, 3), 30 * curves(20, 3)])
    targets[:, 1] = math.nan
    check, known = (each.check(targets, level=0) for each in (reach, whole))
    np.testing.assert_allclose(check.p_value, known.p_value)
    np.testing.assert_allclose(check.nearest_error, known.nearest_error)
    with pytest.warns(OutOfRangeWarning, match="there are 0$"):
        check = reach.check(curves(2, 3))
    assert np.isnan(check.p_value).all()
    assert not check.out_of_range.any()


@pytest.mark.parametrize("target", [0.0, -1.0])
def test_what_no_positive_response_can_be_is_out_of_range(reach, target):
    targets = curves(2, 3)
    targets[1, 0, 2] = target
    with pytest.warns(OutOfRangeWarning, match=r"targets 1 \(p = "):
        check = reach.check(targets)
    np.testing.assert_array_equal(check.out_of_range, [False, True])
    assert np.isfinite(check.shape_distance).all()


def coupled(num: int, seed: int) -> np.ndarray:
    """Signed scalars: a stiffness, a coupling around zero that grows with it, and an entry that is always zero."""
    rng = np.random.default_rng(seed)
    stiffness = np.exp(rng.uniform(0, 1, num))
    coupling = 0.3 * stiffness * rng.uniform(-1, 1, num)
    return np.stack([stiffness, coupling, np.zeros(num)], axis=1)[..., None]


@pytest.fixture(scope="module")
def signed_reach() -> TargetRange:
    return TargetRange(coupled(1000, seed=0), coupled(400, seed=1))


def test_p_values_of_signed_responses_are_as_uniform_as_two_scores_allow(signed_reach):
    """Twice the smaller of two p-values, uniform each: below ``level`` in ``level / 2`` to ``level`` of all cases."""
    p_value = signed_reach.check(coupled(800, seed=2), level=0).p_value
    for level in (0.05, 0.2, 0.5):
        deviation = 3 * math.sqrt(level * (1 - level) * (1 / 800 + 1 / 400))
        assert level / 2 - deviation <= np.mean(p_value <= level) <= level + deviation


def test_signed_entries_that_follow_from_each_other_are_told_from_those_that_contradict():
    def follows(num: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        first, third = rng.normal(size=(2, num))
        return np.stack([first, -0.3 * first + 0.02 * rng.normal(size=num), third], 1)[..., None]

    reach = TargetRange(follows(1500, seed=0), follows(300, seed=1))
    contradictory = follows(50, seed=3) * np.array([1.0, -1.0, 1.0])[:, None]
    contradictory = contradictory[np.abs(contradictory[:, 0, 0]) > 0.5]
    assert (reach.check(contradictory, level=0).p_value < 0.02).all()
    assert reach.check(np.array([[[0.0], [0.0], [math.nan]]]), level=0).p_value > 0.1


@pytest.mark.parametrize(
    "impossible",
    [[2.0, 2.0, 0.0], [2.0, -2.0, 0.0], [-2.0, 0.0, 0.0], [30.0, 0.0, 0.0], [2.0, 0.0, 1.0], [math.nan, 2.0, 0.0]],
)
def test_signed_targets_that_no_design_has_are_out_of_range(signed_reach, impossible):
    targets = np.array([[1.5, -0.3, 0.0], impossible])[..., None]
    with pytest.warns(OutOfRangeWarning, match="targets 1 "):
        check = signed_reach.check(targets)
    np.testing.assert_array_equal(check.out_of_range, [False, True])


@pytest.mark.parametrize("possible", [[2.0, 0.0, 0.0], [math.nan, 0.0, 0.0], [1.4, -0.2, 0.0], [1.4, 0.2, 0.0]])
def test_a_coupling_may_be_zero_or_of_either_sign(signed_reach, possible):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert signed_reach.check(np.array([possible])[..., None]).p_value.item() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((5, 6)), np.ones((5, 2, 6))), r"training_responses must have shape \(N, L, S\), got \(5, 6\)"),
        ((np.ones((5, 2, 6)), np.ones((5, 2, 5))), "heldout_responses must be of the load cases and strains"),
        ((np.ones((5, 2, 6)), np.full((5, 2, 6), np.nan)), "heldout_responses must hold at least two solved "),
        ((np.ones((1, 2, 6)), np.ones((5, 2, 6))), "training_responses must hold at least two solved designs, got 1"),
        ((np.ones((5, 2, 6)), np.ones((5, 2, 6)), 0.0), "tolerance must be a positive number, got 0.0"),
        ((np.ones((5, 2, 6)), np.ones((5, 2, 6)), "1"), "tolerance must be a number, got '1'"),
    ],
)
def test_unfit_responses_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TargetRange(*arguments)


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (np.ones((2, 6)), {}, r"targets must have shape \(T, 2, 6\), got \(2, 6\)"),
        (np.full((1, 2, 6), np.nan), {}, "targets must be finite where given, and given somewhere in each"),
        (np.full((1, 2, 6), np.inf), {}, "targets must be finite where given, and given somewhere in each"),
        (np.ones((1, 2, 6)), {"level": 2.0}, r"level must lie in \[0, 1\], got 2.0"),
        (np.ones((1, 2, 6)), {"level": "low"}, "level must be a number, got 'low'"),
        (np.ones((2, 2, 6)), {"names": ["soft"]}, r"names must be 2, one for each target, got \['soft'\]"),
        (np.ones((2, 2, 6)), {"names": "ab"}, "names must be 2, one for each target, got 'ab'"),
        (np.ones((2, 2, 6)), {"names": 2}, "names must be 2, one for each target, got 2"),
    ],
)
def test_unfit_targets_are_refused(reach, targets, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        reach.check(targets, **options)
