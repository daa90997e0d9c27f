import math

import numpy as np
import pytest

from mechdiffusers.evaluation.inverse_design import read_targets, write_targets
from mechdiffusers.mechanics import ResponseSpec

SPEC = ResponseSpec(
    "stress", ["shear", "shear_x"], [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]], units="MPa", signed=False, solver=None
)
HEADER = "target,load_case,strain,stress\n"


def read(tmp_path, text: str):
    (tmp_path / "targets.csv").write_text(text)
    return read_targets(tmp_path / "targets.csv", SPEC)


def test_what_is_written_is_read(tmp_path):
    targets = np.random.default_rng(0).uniform(0.1, 9, (2, 2, 3))
    targets[1, 0] = targets[0, 1, 2] = math.nan
    write_targets(tmp_path / "targets.csv", dict(zip("ab", targets, strict=True)), SPEC)
    names, found = read_targets(tmp_path / "targets.csv", SPEC)
    assert names == ["a", "b"]
    np.testing.assert_allclose(found, targets, rtol=1e-5)


def test_a_curve_between_other_strains_is_interpolated_and_open_outside(tmp_path):
    _, targets = read(tmp_path, HEADER + "a,shear,0.15,1\na,shear,0.25,2\n")
    np.testing.assert_allclose(targets[0], [[math.nan, 1.5, math.nan], [math.nan] * 3])


def test_an_empty_point_opens_the_curve_on_both_its_sides(tmp_path):
    _, targets = read(tmp_path, HEADER + "a,shear,0.1,1\na,shear,0.15,\na,shear,0.2,3\na,shear,0.25,\na,shear,0.3,4\n")
    np.testing.assert_allclose(targets[0, 0], [1, 3, 4])
    _, targets = read(tmp_path, HEADER + "a,shear,0.1,1\na,shear,0.2,\na,shear,0.3,4\n")
    np.testing.assert_allclose(targets[0, 0], [1, math.nan, 4])
    _, targets = read(tmp_path, HEADER + "a,shear,0.1,1\na,shear,0.15,\na,shear,0.25,4\na,shear,0.3,5\n")
    np.testing.assert_allclose(targets[0, 0], [1, math.nan, 5])


def test_rows_may_come_in_any_order_with_spaces_and_blank_lines(tmp_path):
    _, targets = read(tmp_path, HEADER + "b,shear,0.3, 3\n\nb,shear,0.1,1\nb , shear_x, 0.2, 5\n")
    np.testing.assert_allclose(targets, [[[1, 2, 3], [math.nan, 5, math.nan]]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "targets must have the columns target,load_case,strain and .* in row 1 of targets.csv",
        ),
        (HEADER, "targets must have at least one row"),
        (
            "target,load_case,strain,energy\na,shear,0.1,1\n",
            "targets must have the columns .* got 'energy' as the",
        ),
        (HEADER + "a,bending,0.1,1\n", r"targets must have load cases out of \['shear', 'shear_x'\], got .* in row 2"),
        (HEADER + "a,shear,0.1\n", r"targets must have 4 cells in a row, .* got \['a', 'shear', '0.1'\] in row 2"),
        (HEADER + "a,shear,nan,1\n", "targets must have finite numbers, got strain 'nan' in row 2"),
        (HEADER + "a,shear,-0.1,1\n", "targets must be given at one at least of the strains"),
        (
            HEADER + "a,shear,0.1,-1\n",
            "targets must not be negative unless .* got '-1' in row 2 of targets.csv",
        ),
        (HEADER + "a,shear,0.1,1 MPa\n", "targets must have finite numbers, got '1 MPa' in row 2"),
        (HEADER + "a,shear,,1\n", "targets must be given at one at least of the strains"),
        (HEADER + "a,shear,0.1,1\na,shear,0.1,2\n", "targets must have each strain .* once, got '0.1' again in row 3"),
        (HEADER + "\na,shear,0.1,1\n\na,shear,0.2,x\n", "targets must have finite numbers, got 'x' in row 5"),
        ("\n", "targets must have the columns"),
        (
            HEADER + "a,shear,0.1,1\na,shear_x,0.5,1\n",
            "targets must be given at one at least of the strains .* got none for shear_x of 'a'",
        ),
        (HEADER + "a,shear,0.1,\n", "targets must be given in one load case at least, got none of 'a'"),
    ],
)
def test_unfit_tables_are_refused_with_the_place(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="^targets must be a CSV file that can be read, got .*nowhere.csv"):
        read_targets(tmp_path / "nowhere.csv", SPEC)


def test_targets_of_another_shape_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"^targets must have the shape .* of the strains, got \(2,\) for 'a'"):
        write_targets(tmp_path / "t.csv", {"a": np.ones(2)}, SPEC)
    assert not (tmp_path / "t.csv").exists()


def test_targets_without_a_curve_leave_the_strain_empty_or_have_a_row_each(tmp_path):
    spec = ResponseSpec("stiffness", ["C11", "C12"], [[0.0], [0.0]], units="GPa", signed=True)
    targets = {"a": np.array([[1.5], [-0.25]]), "b": np.array([[math.nan], [0.0]])}
    write_targets(tmp_path / "t.csv", targets, spec)
    text = (tmp_path / "t.csv").read_text()
    assert text.splitlines() == ["target,load_case,strain,stiffness", "a,C11,,1.5", "a,C12,,-0.25", "b,C12,,0"]
    (tmp_path / "wide.csv").write_text("file_name,C12,C11\na,-0.25,1.5\nb,0,\n")
    for path in (tmp_path / "t.csv", tmp_path / "wide.csv"):
        names, found = read_targets(path, spec)
        assert names == ["a", "b"]
        np.testing.assert_array_equal(found, list(targets.values()))
