import argparse
import re
import shutil
import subprocess

import abq2ccx
import meshio
import numpy as np
import pytest
import torch
from meshio.abaqus import _abaqus
from PIL import Image

from mechdiffusers import export_designs, random_composites, simulate

DESIGN = random_composites(1, size=8, seed=2)[0][0, :6].astype(float)  # 6 x 8 pixels
SIDES = ("TOP", "BOTTOM", "LEFT", "RIGHT")
PHASES = ("SOFT", "STIFF")

#: A model that includes a deck and names everything in it: extension by 0.001 of the height.
MODEL = """*INCLUDE, INPUT=d.inp
*SOLID SECTION, ELSET=SOFT, MATERIAL=SOFT
1.0
*SOLID SECTION, ELSET=STIFF, MATERIAL=STIFF
1.0
*MATERIAL, NAME=SOFT
*ELASTIC
1.0, 0.3
*MATERIAL, NAME=STIFF
*ELASTIC
100.0, 0.3
*BOUNDARY
BOTTOM, 1, 2, 0.0
*STEP
*STATIC
*BOUNDARY
TOP, 1, 1, 0.0
TOP, 2, 2, 0.003
*NODE PRINT, NSET=TOP, TOTALS=ONLY
RF
*NODE PRINT, NSET=LEFT
U
*NODE PRINT, NSET=RIGHT
U
*END STEP
"""


@pytest.fixture
def planar(monkeypatch):
    """meshio writes Abaqus decks, and reads them but for elements of plane strain."""
    monkeypatch.setitem(_abaqus.abaqus_to_meshio_type, "CPE4", "quad")
    monkeypatch.setitem(_abaqus.abaqus_to_meshio_type, "CPE8", "quad8")


def read(path) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Nodes, elements, which of these are stiff, and the nodes of the sides, as meshio reads a file."""
    mesh = meshio.read(path)
    cells = mesh.cells[0].data
    if path.suffix == ".inp":
        (elements,) = (block.data for block in mesh.cells)
        stiff = np.isin(np.arange(len(elements)), mesh.cell_sets["STIFF"][0])
        assert set(np.concatenate([mesh.cell_sets[name][0] for name in PHASES])) == set(range(len(elements)))
        return mesh.points, elements, stiff, {name: mesh.point_sets[name] for name in SIDES}
    if path.suffix == ".vtu":
        return (
            mesh.points,
            cells,
            mesh.cell_data["phase"][0] == 1,
            {name: np.flatnonzero(mesh.point_data[name]) for name in SIDES},
        )
    tags = {name: tag for name, (tag, _) in mesh.field_data.items()}
    assert [mesh.field_data[name][1] for name in (*PHASES, *SIDES)] == [2, 2, 1, 1, 1, 1]
    groups = mesh.cell_data["gmsh:physical"]
    pairs = list(zip(mesh.cells, groups, strict=True))
    elements = np.concatenate([block.data for block, _ in pairs if block.type.startswith("quad")])
    marks = np.concatenate([group for block, group in pairs if block.type.startswith("quad")])
    edges = {
        name: np.concatenate(
            [block.data[group == tags[name]] for block, group in pairs if block.type.startswith("line")]
        )
        for name in SIDES
    }
    return mesh.points, elements, marks == tags["STIFF"], {name: np.unique(nodes) for name, nodes in edges.items()}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("form", ["inp", "vtu", "msh"])
def test_a_mesh_has_a_quadrilateral_a_pixel_its_phases_and_its_sides(tmp_path, form, order, planar):
    export_designs(DESIGN[None], tmp_path, names=["d"], formats=[form], element_order=order, pixel_size=0.5)
    points, elements, stiff, sides = read(tmp_path / f"d.{form}")
    num_nodes = 4 if order == 1 else 8 if form == "inp" else 9  # Abaqus has no plane strain of 9 nodes
    assert elements.shape == (48, num_nodes)
    corners = points[elements[:, :4], :2]
    # counterclockwise squares, one a pixel
    edges = np.roll(corners, -1, axis=1) - corners
    area = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]
    np.testing.assert_allclose(area, 0.25)
    column, row = np.round(corners.mean(1) / 0.5 - 0.5).astype(int).T
    np.testing.assert_array_equal(stiff, DESIGN[5 - row, column] == 1)  # row 0 of the design is at the top
    assert len(set(zip(row, column, strict=True))) == 48
    if order == 2:
        np.testing.assert_allclose(points[elements[:, 4:8], :2], corners + edges / 2)
    if num_nodes == 9:
        np.testing.assert_allclose(points[elements[:, 8], :2], corners.mean(1))
    for name, axis, place in (("TOP", 1, 3.0), ("BOTTOM", 1, 0.0), ("LEFT", 0, 0.0), ("RIGHT", 0, 4.0)):
        np.testing.assert_array_equal(np.sort(sides[name]), np.flatnonzero(np.isclose(points[:, axis], place)))
    assert len(points) == len(np.unique(elements)) == {4: 7 * 9, 8: 13 * 17 - 48, 9: 13 * 17}[num_nodes]


@pytest.mark.parametrize("order", [1, 2])
def test_another_reader_finds_the_nodes_elements_and_sets_of_a_deck(tmp_path, order, planar):
    export_designs(DESIGN[None], tmp_path, names=["d"], formats=["inp"], element_order=order)
    points, elements, stiff, sides = read(tmp_path / "d.inp")
    (tmp_path / "model.inp").write_text(MODEL)
    report = abq2ccx.Report()
    converter = abq2ccx.Converter(report, argparse.Namespace())
    converter.convert(abq2ccx.read_blocks(str(tmp_path / "model.inp"), report))
    assert report.n_warnings == 0  # such as of a set that is missing
    found = converter.geom
    np.testing.assert_array_equal([found.nodes[number + 1] for number in range(len(points))], points)
    assert found.elements == {
        number + 1: (f"CPE{4 * order}", (nodes + 1).tolist()) for number, nodes in enumerate(elements)
    }
    assert {name: found.elset(name) for name in PHASES} == {
        "SOFT": (np.flatnonzero(~stiff) + 1).tolist(),
        "STIFF": (np.flatnonzero(stiff) + 1).tolist(),
    }
    assert {name: found.nset(name) for name in SIDES} == {name: (sides[name] + 1).tolist() for name in SIDES}


def test_every_field_of_a_deck_is_short_enough_for_the_solvers(tmp_path):
    export_designs(DESIGN[None], tmp_path, names=["d"], formats=["inp"], pixel_size=1 / 3)
    data = [line for line in (tmp_path / "d.inp").read_text().splitlines()[3:] if not line.startswith("*")]
    assert max(len(field.strip()) for line in data for field in line.split(",")) <= 20
    assert max(len(line.split(",")) for line in data) <= 16


@pytest.mark.skipif(shutil.which("ccx") is None, reason="CalculiX is not installed (Debian: calculix-ccx)")
@pytest.mark.parametrize("order", [1, 2])
def test_calculix_finds_our_response_to_a_small_strain(tmp_path, order):
    export_designs(DESIGN[None], tmp_path, names=["d"], formats=["inp"], element_order=order, pixel_size=0.5)
    (tmp_path / "model.inp").write_text(MODEL)
    done = subprocess.run(["ccx", "model"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    printed = (tmp_path / "model.dat").read_text()
    force = float(re.search(r"total force.*\n\n *\S+ +(\S+)", printed)[1])
    # linear elasticity is the limit of a small strain; the force is the stress times the width
    ours = simulate(
        DESIGN[None], ["uniaxial_extension"], [1e-6], element_order=order, pixel_size=0.5, return_fields=True
    )
    expected = ours.stress.item() / 1e-6 * 1e-3 * 4.0
    if order == 1:
        assert force == pytest.approx(expected, rel=1e-5)
        displacement = ours.displacement[0, 0, 0] / 1e-6 * 1e-3  # of the left side, then of the right side
        moved = np.array(re.findall(r"^ +\d+ +(\S+) +(\S+) +\S+$", printed, re.M), dtype=float)
        np.testing.assert_allclose(moved, np.concatenate([displacement[:, 0], displacement[:, -1]]), atol=1e-8)
    else:  # 8 nodes are stiffer than 9
        assert expected < force < 1.03 * expected


def test_pictures_and_arrays_are_the_designs(tmp_path):
    grey = np.linspace(0, 1, 48).reshape(6, 8)
    for kind in (np.asarray, torch.as_tensor):
        export_designs(kind(np.stack([DESIGN, grey])), tmp_path, formats=["png", "npy"])
        pictures = [Image.open(tmp_path / f"design-00{index}.png") for index in range(2)]
        assert [picture.mode for picture in pictures] == ["1", "L"]
        np.testing.assert_array_equal(np.asarray(pictures[0]), DESIGN == 1)
        np.testing.assert_array_equal(np.asarray(pictures[1]), np.rint(255 * grey))
        np.testing.assert_array_equal(np.load(tmp_path / "design-001.npy"), grey)


def test_a_design_of_one_phase_has_an_empty_set_of_the_other(tmp_path, planar):
    export_designs(np.ones((1, 2, 2)), tmp_path, names=["d"], formats=["vtu", "msh", "inp"])
    assert read(tmp_path / "d.vtu")[2].all()
    assert read(tmp_path / "d.msh")[2].all()
    assert "ELSET=SOFT" not in (tmp_path / "d.inp").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"designs": np.full((1, 2, 2), 0.5)}, r"designs must be 0 or 1 everywhere for meshes \(inp\), got 0.5"),
        ({"designs": np.full((1, 2, 2), 2.0)}, r"designs must lie in \[0, 1\] everywhere"),
        ({"designs": np.full((1, 2, 2), np.nan)}, r"designs must lie in \[0, 1\] everywhere"),
        (
            {"designs": np.ones((2, 2))},
            r"designs must be numbers of shape \(B, H, W\), none of them 0, got shape \(2, 2\)",
        ),
        ({"designs": np.full((1, 2, 2), "1")}, r"designs must be numbers .*, got shape \(1, 2, 2\) of <U1"),
        ({"names": ["a", "a"]}, "names must be 2 different names of files"),
        ({"names": ["a"]}, "names must be 2 different names of files"),
        ({"names": ["a", "../b"]}, "names must be 2 different names of files"),
        ({"names": ["a", "c\\\\b"]}, "names must be 2 different names of files"),
        ({"names": 3}, "names must be 2 different names of files, .*, got \\[3\\]"),
        ({"formats": ["stl"]}, "formats must be a list of some of png, npy, inp, vtu, msh, got .'stl'"),
        ({"formats": "png"}, "formats must be a list of some of .*, got 'png'"),
        ({"formats": []}, "formats must be a list of some of .*, got \\[\\]"),
        ({"element_order": 3}, "element_order must be 1 or 2, got 3"),
        ({"pixel_size": 0}, "pixel_size must be a positive number, got 0"),
    ],
)
def test_unfit_arguments_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        export_designs(**{"designs": np.ones((2, 2, 2)), "folder": tmp_path / "out", **changes})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^folder must be one that can be written, got .*file"):
        export_designs(np.ones((1, 2, 2)), tmp_path / "file")


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path, monkeypatch):
    def write_half(path, *_, **__):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(meshio, "write", write_half)
    with pytest.raises(ValueError, match="disk full"):
        export_designs(np.ones((1, 2, 2)), tmp_path, names=["d"], formats=["npy", "inp"])
    assert [path.name for path in tmp_path.iterdir()] == ["d.npy"]


def test_tensors_of_half_precision_are_exported(tmp_path):
    export_designs(torch.tensor([[[0, 0.5]]], dtype=torch.bfloat16), tmp_path, names=["d"], formats=["npy"])
    np.testing.assert_array_equal(np.load(tmp_path / "d.npy"), [[0, 0.5]])
