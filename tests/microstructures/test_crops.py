import numpy as np
import pytest

from mechdiffusers.microstructures.crops import draw_crops, resize_by_area


def positions(crops: np.ndarray, width: int) -> np.ndarray:
    """Upper left corners of crops of an image whose pixels count from 0."""
    return np.stack(np.divmod(crops[:, 0, 0], width), 1)


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (64, 64)])
def test_no_crop_to_train_on_overlaps_a_held_out_one(shape):
    image = np.arange(np.prod(shape)).reshape(shape)
    train, heldout = draw_crops([image], 16, 500, 200, seed=0)
    assert train.shape == (500, 16, 16)
    assert heldout.shape == (200, 16, 16)
    assert not np.intersect1d(train, heldout).size
    for crop in (*train[:20], *heldout[:20]):  # each is a piece of the image as it stands
        row, column = divmod(crop[0, 0], shape[1])
        np.testing.assert_array_equal(crop, image[row : row + 16, column : column + 16])


def test_crops_are_uniform_over_the_positions_of_all_images():
    small, large = np.arange(20 * 40).reshape(20, 40), 10_000 + np.arange(20 * 80).reshape(20, 80)
    train, _ = draw_crops([small, large], 16, 20_000, 1, seed=1)
    # of the columns that are left beside a fifth, at least a crop: 24 and 64
    places = np.array([5 * 9, 5 * 49])
    share = (train[:, 0, 0] >= 10_000).mean()
    assert abs(share - places[1] / places.sum()) < 4 * np.sqrt(share * (1 - share) / 20_000)
    rows = positions(train[train[:, 0, 0] < 10_000], 40)[:, 0]
    assert set(rows) == set(range(5))


def test_the_seed_says_which_and_more_crops_begin_with_the_same():
    image = np.arange(64 * 64).reshape(64, 64)
    few, many, other = (draw_crops([image], 8, num, 3, seed)[0] for num, seed in ((5, 0), (9, 0), (9, 1)))
    np.testing.assert_array_equal(few, many[:5])
    assert (many != other).any()


@pytest.mark.parametrize(("shape", "most"), [((30, 31), 15), ((10, 100), 10), ((100, 24), 24)])
def test_an_image_without_room_is_refused_with_what_would_fit(shape, most):
    draw_crops([np.zeros(shape)], most, 1, 1, seed=0)
    with pytest.raises(ValueError, match=f"at most {most} for an image of .* pixels, got {most + 1}"):
        draw_crops([np.zeros(shape)], most + 1, 1, 1, seed=0)


def test_resizing_takes_the_mean_of_the_area():
    grey = np.random.default_rng(0).integers(0, 256, (12, 24)).astype(np.uint8)
    expected = grey.reshape(4, 3, 8, 3).mean((1, 3))
    np.testing.assert_allclose(resize_by_area(grey, 4), expected, atol=0.5)
    two = grey > 100
    np.testing.assert_array_equal(resize_by_area(two, 4), two.reshape(4, 3, 8, 3).mean((1, 3)) > 0.5)
    np.testing.assert_array_equal(resize_by_area(two, 12), two)


def test_resizing_to_sides_that_do_not_divide_keeps_the_mean():
    grey = np.random.default_rng(0).integers(0, 256, (30, 50)).astype(np.uint8)
    reduced = resize_by_area(grey, 7)
    assert reduced.shape == (7, 12)
    assert abs(reduced.mean() - grey.mean()) < 2


def test_enlarging_is_refused():
    with pytest.raises(ValueError, match="^resize must be at most the 8 pixels of the shorter side of an image, got 9"):
        resize_by_area(np.zeros((8, 20), dtype=bool), 9)
