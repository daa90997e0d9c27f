"""Pictures of simulations show what was solved."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mechdiffusers.mechanics import simulate
from mechdiffusers.mechanics.plots import draw_deformed, save_path_animation, save_simulation_figure
from mechdiffusers.microstructures import random_composites

DESIGNS, _ = random_composites(2, size=4)


@pytest.fixture
def result():
    """Two designs, of which the second is not solved at the last two of five strains."""
    strains = [0.02, 0.04, 0.06, 0.08, 0.1]
    result = simulate(DESIGNS, ["shear"], strains, element_order=2, return_fields=True)
    for field in (result.stress, result.displacement, result.pixel_stress):
        field[1, 0, 3:] = np.nan
    result.converged[1] = False
    return result


def test_the_picture_says_which_strain_it_shows(result, monkeypatch, tmp_path):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title: titles.append(title))
    for index in (0, 1):
        save_simulation_figure(DESIGNS[index], result, tmp_path / "s.png", index=index, load_cases=["shear"])
    assert titles[1::2] == ["shear, strain 0.1", "shear, strain 0.06"]
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]


def test_the_film_goes_through_every_solved_strain_and_back(result, tmp_path):
    for index, frames in ((0, 5 + 3), (1, 3 + 1)):
        save_path_animation(result, tmp_path / "path.gif", index=index)
        assert Image.open(tmp_path / "path.gif").n_frames == frames


def test_pixels_are_drawn_where_their_nodes_have_gone():
    displacement = np.zeros((3, 5, 2))  # order 1, 2 x 4 pixels
    displacement[0, :, 1] = 0.5  # the top row of nodes, upwards
    patches = draw_deformed(Figure().subplots(), displacement, np.zeros((2, 4)), 1.0)
    tops = [path.vertices[:, 1].max() for path in patches.get_paths()]
    assert tops == [2.5] * 4 + [1.0] * 4


@pytest.mark.parametrize(
    ("change", "name"), [({"displacement": None}, "result"), ({"component": "zz"}, "component"), ({}, "result")]
)
def test_what_cannot_be_drawn_is_named(change, name, result, tmp_path):
    component = change.pop("component", "yy")
    for field, value in change.items():
        setattr(result, field, value)
    result.pixel_stress[0] = np.nan
    with pytest.raises(ValueError, match=f"^{name} must"):
        save_path_animation(result, tmp_path / "path.gif", component=component)
    assert not list(tmp_path.iterdir())
