import math

import numpy as np
import pytest

from mechdiffusers.microstructures.response_table import read_response_table

HEADER = "design,load_case,strain,stress\n"


def read(tmp_path, text: str | bytes, **options):
    path = tmp_path / "results.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_response_table(path, **options)


def test_a_row_a_point_gives_curves_in_the_order_of_the_file(tmp_path):
    table = read(tmp_path, HEADER + "b,shear,0.2,2\nb,shear,0.1,-1\na,pull,0.1,3\na,shear,0.1,\n")
    assert table.quantity == "stress"
    assert list(table.curves) == ["b", "a"]
    assert table.load_cases == ["shear", "pull"]
    np.testing.assert_array_equal(table.at("b", ["shear", "pull"], [[0.1, 0.2]] * 2), [[-1, 2], [math.nan] * 2])
    np.testing.assert_array_equal(table.at("a", ["shear", "pull"], [[0.1, 0.2]] * 2), [[math.nan] * 2, [3, math.nan]])


def test_curves_are_interpolated_and_never_extrapolated(tmp_path):
    table = read(tmp_path, HEADER + "".join(f"a,pull,{strain},{strain**2}\n" for strain in (0.1, 0.2, 0.4)))
    found = table.at("a", ["pull"], [[0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.41]])
    np.testing.assert_allclose(found, [[math.nan, 0.01, 0.025, 0.04, 0.1, 0.16, math.nan]])


@pytest.mark.parametrize("first", ["file_name", "design"])
def test_a_row_a_design_gives_entries_without_a_curve(tmp_path, first):
    table = read(tmp_path, f"{first},C11,C12\nx.png,1.5,-2e-3\ny.png,,4\n")
    assert table.quantity is None
    assert table.load_cases == ["C11", "C12"]
    np.testing.assert_array_equal(table.at("x.png", ["C12", "C11"], [[0.0], [0.0]]), [[-2e-3], [1.5]])
    assert np.isnan(table.at("y.png", ["C11"], [[0.0]])).all()


def test_a_quantity_without_a_curve_leaves_the_strain_empty(tmp_path):
    table = read(tmp_path, "design,load_case,strain,porosity\na,total,,0\n")
    np.testing.assert_array_equal(table.at("a", ["total"], [[0.0]]), [[0.0]])


def test_a_cell_may_hold_commas_and_line_breaks_in_quotes(tmp_path):
    table = read(tmp_path, HEADER + '"a,1",pull,0.1,1\r\n\r\n"b",pull,0.1,2\r\n')
    assert list(table.curves) == ["a,1", "b"]
    assert table.where("b") == "row 4 of results.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "responses must have the columns design,load_case,strain and .* got '' in row 1 of results.csv"),
        (HEADER, "responses must have at least one row besides the header"),
        ("design,strain,stress\na,0.1,1\n", "responses must have the columns"),
        ("file_name,C11,C11\na,1,2\n", "responses must have the columns .* each once, got 'file_name,C11,C11'"),
        ("file_name,C11,\na,1,2\n", "responses must have the columns"),
        ("design,load_case,stress\na,pull,2\n", "responses must have the columns"),
        (
            HEADER.replace(",", ";") + "a;b;0,1;2\n",
            "responses must have commas between cells .* comma as the separator",
        ),
        (HEADER.replace(",", "\t"), "responses must have commas between cells"),
        (
            HEADER + "a,pull,0,1,2,5\n",
            r"responses must have 4 cells in a row, and points in numbers, got .* in row 2 of",
        ),
        (
            HEADER + 'a,pull,0.1,"2,5"\n',
            "responses must have finite numbers, got '2,5' in row 2 .*: write numbers with a po",
        ),
        (
            HEADER + "a,pull,0.1,2\nb,pull,0.1,3 MPa\n",
            "responses must have .* '3 MPa' in row 3 .*the number alone, without",
        ),
        (HEADER + "a,pull,10%,2\n", "responses must have finite numbers, got strain '10%' in row 2 .* without units"),
        (HEADER + "a,pull,0.1,inf\n", "responses must have finite numbers, got 'inf' in row 2"),
        (HEADER + "a,pull,nan,1\n", "responses must have finite numbers, got strain 'nan' in row 2"),
        (HEADER + "a,pull,0.1,1_0\n", "responses must have finite numbers, got '1_0' in row 2"),
        (HEADER + ",pull,0.1,1\n", "responses must have a design in every row, got none in row 2"),
        (HEADER + "a,,0.1,1\n", "responses must have a load_case in every row, got none in row 2"),
        (
            HEADER + "a,pull,0.1,1\n\na,pull,0.10,2\n",
            "responses must have each strain of a curve once, got '0.10' again in r",
        ),
        (
            HEADER + "a,pull,0.1,1\na,pull,,2\n",
            "responses must have a strain at every point of a curve, .* got 'none' in row 3",
        ),
        ("file_name,C11\na,1\na,2\n", "responses must have each design once, got 'a' again in row 3"),
        (
            HEADER.encode("utf-8-sig") + b"a,pull,0.1,1\n",
            "responses must be UTF-8 without a byte-order mark, .* row 1 of",
        ),
        (HEADER.encode("utf-16"), "responses must be UTF-8 without a byte-order mark"),
        (
            HEADER.encode() + "a,pull,0.1,1\né,pull,0.1,1\n".encode("latin-1"),
            "responses must be in UTF-8, .* in row 3 of",
        ),
    ],
)
def test_unfit_tables_are_refused_with_file_row_and_remedy(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        read(tmp_path, text)


def test_negative_values_are_refused_unless_the_quantity_is_signed(tmp_path):
    text = HEADER + "a,pull,-0.1,1\na,pull,0.1,-1\n"
    assert read(tmp_path, text).at("a", ["pull"], [[0.1]]) == [[-1]]
    with pytest.raises(ValueError, match="^targets must not be negative .* got '-1' in row 3 of results.csv"):
        read(tmp_path, text, signed=False, argument="targets")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="^responses must be a CSV file that can be read, got .*nowhere.csv"):
        read_response_table(tmp_path / "nowhere.csv")
