import math
from dataclasses import replace

import numpy as np
import pytest

from mechdiffusers.evaluation.inverse_design import read_targets, write_targets
from mechdiffusers.mechanics import ResponseSpec

SPEC = ResponseSpec(
    "stress", ["shear", "shear_x"], [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]], units="MPa", signed=False, solver=None
)
HEADER = "target,load_case,strain,stress\n"


SCALAR = ResponseSpec("stiffness", ["C11", "C16"], [[0.0], [0.0]], units="GPa", signed=True)


def read(tmp_path, text: str | bytes, spec: ResponseSpec = SPEC):
    (tmp_path / "targets.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_targets(tmp_path / "targets.csv", spec)


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
            "targets must have the columns target,load_case,strain and the quantity's name, or target and the names of "
            "entries, each once, got '' in row 1 of targets.csv",
        ),
        (HEADER, "targets must have at least one row besides the header, got none in targets.csv"),
        (
            "target,load_case,strain,energy\na,shear,0.1,1\n",
            "targets must have the columns target,load_case,strain,stress, got 'energy' as the last in row 1 of ",
        ),
        ("target,load_case,strain,\na,shear,0.1,1\n", "targets must have the columns .* in row 1"),
        ("design,load_case,strain,stress\na,shear,0.1,1\n", "targets must have the columns target,.* in row 1"),
        (
            HEADER + "b,shear,0.1,1\na,bending,0.1,1\n",
            r"targets must have load cases out of \['shear', 'shear_x'\], got 'bending' of 'a', which begins in row 3 ",
        ),
        (
            HEADER + "a,shear,0.1\n",
            r"targets must have 4 cells in a row, and points in numbers, got \['a', 'shear', '0.1'\] in row 2 of ",
        ),
        (HEADER + "a,shear,nan,1\n", "targets must have finite numbers, got strain 'nan' in row 2 of targets.csv$"),
        (
            HEADER + "a,shear,-0.1,1\n",
            "targets must be given at one at least of the strains .* got none for shear of 'a'",
        ),
        (HEADER + "a,shear,,1\n", "targets must be given at one at least of the strains .* got none for shear of 'a'"),
        (HEADER + "a,shear,0.1,inf\n", "targets must have finite numbers, got 'inf' in row 2 of targets.csv$"),
        (
            HEADER + "a,shear,0.1,-1\n",
            "targets must not be negative unless the specification is signed, got '-1' in row 2 of targets.csv",
        ),
        (
            HEADER + "a,shear,0.1,1 MPa\n",
            "targets must have finite numbers, got '1 MPa' in row 2 of targets.csv: write the number alone, without",
        ),
        (HEADER + 'a,shear,0.1,"1,5"\n', "targets must have finite numbers, got '1,5' .*: write numbers with a point"),
        (HEADER + "a,shear,0.1,1_000\n", "targets must have finite numbers, got '1_000' in row 2"),
        (
            HEADER + "a,shear,0.1,1\na,shear,,1\n",
            "targets must have a strain at every point of a curve, and at none of a quantity without a curve, got "
            "'none' in row 3",
        ),
        (HEADER + ",shear,0.1,1\n", "targets must have a target in every row, got none in row 2"),
        (HEADER + "a,,0.1,1\n", "targets must have a load_case in every row, got none in row 2"),
        (
            HEADER + "a,shear,0.1,1\na,shear,0.1,2\n",
            "targets must have each strain of a curve once, got '0.1' again in row 3",
        ),
        (
            HEADER + "\na,shear,0.1,1\n\na,shear,0.2,-2\n",
            "targets must not be negative unless the specification is signed, got '-2' in row 5",
        ),
        (
            HEADER.replace(",", ";") + "a;shear;0,1;1\n",
            "targets must have commas between cells and points in numbers, got 'target;load_case;strain;stress' in row "
            "1 of targets.csv: export it with a comma as the separator",
        ),
        (HEADER.replace(",", "\t"), "targets must have commas between cells .* in row 1"),
        (
            "\ufeff" + HEADER + "a,shear,0.1,1\n",
            "targets must be UTF-8 without a byte-order mark, got one in row 1 of targets.csv: save it as UTF-8",
        ),
        (HEADER.encode("utf-16"), "targets must be UTF-8 without a byte-order mark, got one in row 1"),
        (
            (HEADER + "a,shear,0.1,1\nsüd,shear,0.1,1\n").encode("latin-1"),
            "targets must be in UTF-8, got another encoding in row 3 of targets.csv: save it as UTF-8",
        ),
        (HEADER + 'a,"shear,0.1,1\n', "targets must be a CSV file that can be read, got row 2 of targets.csv: unexp"),
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


def test_a_negative_target_of_a_signed_specification_is_read(tmp_path):
    signed = replace(SPEC, signed=True)
    text = HEADER + "a,shear,0.1,-1\na,shear,0.3,1\n"
    np.testing.assert_allclose(read(tmp_path, text, signed)[1], [[[-1, 0, 1], [math.nan] * 3]], atol=1e-15)


def test_a_target_may_be_zero(tmp_path):
    _, targets = read(tmp_path, HEADER + "".join(f"a,shear,{strain},0\n" for strain in (0.1, 0.2, 0.3)))
    np.testing.assert_array_equal(targets, [[[0, 0, 0], [math.nan] * 3]])


@pytest.mark.parametrize(
    "text",
    [
        "target,load_case,strain,stiffness\na,C11,,3\na,C16,,-0.5\nb,C16,,\nb,C11,,4\n",
        "file_name,C11,C16\na,3,-0.5\nb,4,\n",
        "target,C16,C11\na,-0.5,3\nb,nan,4\n",
    ],
    ids=["a row a point", "a row a target", "entries in another order"],
)
def test_signed_scalars_are_read_with_a_row_a_point_or_a_row_a_target(tmp_path, text):
    names, targets = read(tmp_path, text, SCALAR)
    assert names == ["a", "b"]
    np.testing.assert_array_equal(targets, [[[3], [-0.5]], [[4], [math.nan]]])


def test_signed_scalars_that_are_written_are_read(tmp_path):
    targets = {"a": np.array([[3.0], [-0.5]]), "b": np.array([[math.nan], [0.0]])}
    write_targets(tmp_path / "targets.csv", targets, SCALAR)
    assert (tmp_path / "targets.csv").read_text().splitlines()[:2] == ["target,load_case,strain,stiffness", "a,C11,,3"]
    names, found = read_targets(tmp_path / "targets.csv", SCALAR)
    assert names == ["a", "b"]
    np.testing.assert_array_equal(found, np.stack(list(targets.values())))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,C11\na,3\na,4\n", "targets must have each design once, got 'a' again in row 3"),
        ("file_name,C11,C11\na,3,4\n", "targets must have the columns .* each once, got 'file_name,C11,C11' in row 1"),
        ("file_name,C12\na,3\n", r"targets must have load cases out of \['C11', 'C16'\], got 'C12' of 'a', .* row 2"),
        (
            "target,load_case,strain,stiffness\na,C11,,3\na,C11,,3\n",
            "targets must have each strain of a curve once, got 'no strain' again in row 3",
        ),
    ],
)
def test_unfit_tables_of_scalars_are_refused_with_the_place(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        read(tmp_path, text, SCALAR)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="^targets must be a CSV file that can be read, got .*nowhere.csv"):
        read_targets(tmp_path / "nowhere.csv", SPEC)


def test_targets_of_another_shape_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"^targets must have the shape .* of the strains, got \(2,\) for 'a'"):
        write_targets(tmp_path / "t.csv", {"a": np.ones(2)}, SPEC)
    assert not (tmp_path / "t.csv").exists()
