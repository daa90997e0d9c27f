import re
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mechdiffusers.microstructures import random_composites
from mechdiffusers.training import TrainingConfig
from mechdiffusers.training.data import load_designs

BINARY = np.random.default_rng(0).integers(0, 2, (12, 6, 10)).astype(np.uint8) * 255
GREY = np.random.default_rng(1).integers(0, 256, (12, 6, 10)).astype(np.uint8)


def config(dataset, **settings) -> TrainingConfig:
    return TrainingConfig(output_dir="unused", dataset=str(dataset), **{"num_heldout_designs": 4, **settings})


def write_folder(folder, images):
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def write_parquet(folder, images, column="image"):
    datasets.Dataset.from_dict({column: list(images)}).to_parquet(folder / "designs.parquet")
    return folder / "designs.parquet"


def all_of(designs) -> set[bytes]:
    return {image.numpy().tobytes() for image, _ in designs.train} | {x.numpy().tobytes() for x in designs.heldout}


def test_generated_designs_are_those_of_the_generator_and_heldout_ones_stay_when_more_are_trained_on():
    few = load_designs(config("random_composites", num_train_designs=8, resolution=16))
    many = load_designs(config("random_composites", num_train_designs=20, resolution=16))
    assert few.size == (16, 16)
    assert torch.equal(few.heldout, many.heldout)
    assert torch.equal(few.heldout[:, 0] / 255, torch.from_numpy(random_composites(4, 16, 0)[0]))
    assert few.num_train == len(few.train) == 8


def test_a_folder_is_split_without_overlap_and_in_the_same_way_every_time(tmp_path):
    folder = write_folder(tmp_path, BINARY)
    first, second = load_designs(config(folder)), load_designs(config(folder))
    assert torch.equal(first.heldout, second.heldout)
    assert (len(first.train), len(first.heldout), first.size) == (8, 4, (6, 10))
    assert all_of(first) == {image.tobytes() for image in BINARY}
    assert not torch.equal(first.heldout, load_designs(config(folder, seed=1)).heldout)


def test_the_number_of_training_designs_can_be_limited(tmp_path):
    assert len(load_designs(config(write_folder(tmp_path, BINARY), num_train_designs=3)).train) == 3


@pytest.mark.parametrize("values", ["uint8", "float", "bool", "one channel"])
def test_a_parquet_file_may_hold_its_pixels_in_several_ways(tmp_path, values):
    images = {
        "uint8": BINARY,
        "float": BINARY / 255.0,
        "bool": BINARY > 0,
        "one channel": (BINARY / 255.0)[:, None],
    }[values]
    designs = load_designs(config(write_parquet(tmp_path, images)))
    assert all_of(designs) == {image.tobytes() for image in BINARY}


def test_grey_images_keep_their_levels(tmp_path):
    settings = {"decoder_likelihood": "discretized_logistic"}
    assert all_of(load_designs(config(write_folder(tmp_path, GREY), **settings))) == {x.tobytes() for x in GREY}
    assert all_of(load_designs(config(write_parquet(tmp_path, GREY / 255.0), **settings))) == {
        x.tobytes() for x in GREY
    }


def test_a_stream_repeats_without_end_and_never_shows_a_heldout_design(tmp_path):
    path = write_parquet(tmp_path, BINARY)
    designs = load_designs(config(path, streaming=True, num_train_designs=5))
    seen = [image.numpy().tobytes() for image, _ in islice(designs.train, 20)]
    assert len(set(seen)) == 5
    assert all(seen.count(image) == 4 for image in set(seen))
    assert not set(seen) & {image.numpy().tobytes() for image in designs.heldout}


def test_files_of_another_kind_in_a_folder_are_named(tmp_path):
    write_folder(tmp_path, BINARY)
    (tmp_path / "notes.txt").write_text("mixed")
    with pytest.raises(ValueError, match=r"^dataset must be a folder of images alone .* with 'notes.txt'"):
        load_designs(config(tmp_path))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^dataset must be a folder of images, got .* which is empty"):
        load_designs(config(tmp_path))


def test_an_image_of_another_size_is_named(tmp_path):
    write_folder(tmp_path, BINARY)
    Image.fromarray(BINARY[0, :, :8]).save(tmp_path / "999.png")
    with pytest.raises(
        ValueError, match=r"^all images must have one size, \(6, 10\) .* got image 12 of .* with \(6, 8\)"
    ):
        load_designs(config(tmp_path))


def test_a_colour_image_is_refused(tmp_path):
    colour = np.zeros((6, 10, 3), dtype=np.uint8)
    colour[..., 1] = 255
    write_folder(tmp_path, [colour])
    with pytest.raises(ValueError, match=r"^images must be grey or binary, got image 0 .* in colour"):
        load_designs(config(tmp_path))


def test_a_grey_image_stored_as_rgb_is_taken(tmp_path):
    designs = load_designs(config(write_folder(tmp_path, np.repeat(BINARY[..., None], 3, axis=-1))))
    assert all_of(designs) == {image.tobytes() for image in BINARY}


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_images_of_more_than_eight_bits_are_refused(tmp_path, mode):
    values = np.full((6, 10), 1000, dtype=np.uint16 if mode == "I;16" else np.float32)
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"^images must have 8 bits or 1, got image 0 of .*deep.tif"):
        load_designs(config(tmp_path))


def test_transparent_images_are_refused(tmp_path):
    Image.fromarray(np.full((6, 10, 4), 128, dtype=np.uint8)).save(tmp_path / "glass.png")
    with pytest.raises(ValueError, match=r"^images must be opaque, got image 0 of .*glass.png"):
        load_designs(config(tmp_path))


def test_a_damaged_image_file_is_named(tmp_path):
    write_folder(tmp_path, BINARY)
    (tmp_path / "007.png").write_bytes((tmp_path / "007.png").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"^images must be files that can be read, got image 7 of .*007.png"):
        load_designs(config(tmp_path))


def test_a_stream_that_is_too_short_is_refused(tmp_path):
    path = write_parquet(tmp_path, BINARY[:3])
    with pytest.raises(ValueError, match="^dataset must have num_heldout_designs=4 designs to hold out, got 3 from"):
        load_designs(config(path, streaming=True, num_train_designs=5))


def test_a_stream_that_ends_before_its_number_says_so_instead_of_repeating_what_there_is(tmp_path):
    designs = load_designs(config(write_parquet(tmp_path, BINARY[:9]), streaming=True, num_train_designs=6))
    rows = iter(designs.train)
    assert len([next(rows) for _ in range(5)]) == 5
    with pytest.raises(ValueError, match="^num_train_designs must be at most .*, 5, got 6$"):
        next(rows)


def test_grey_levels_under_a_bernoulli_decoder_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^images must be binary .* got image 0 of .* 'discretized_logistic' is for those"
    ):
        load_designs(config(write_folder(tmp_path, GREY)))


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.5])
def test_nan_and_values_outside_are_named(tmp_path, bad):
    images = BINARY / 255.0
    images[7, 2, 3] = bad
    with pytest.raises(ValueError, match="^images must be booleans, floats in .* got image 7 of"):
        load_designs(config(write_parquet(tmp_path, images)))


def test_an_unknown_column_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^image_column must be one of \['picture'\] of .*, got 'image'"):
        load_designs(config(write_parquet(tmp_path, BINARY, column="picture")))


@pytest.mark.parametrize(("num_train", "least"), [(8, 8), (None, 1)])
def test_too_few_designs_are_refused(tmp_path, num_train, least):
    wanted = f"{4 + least} designs (num_heldout_designs=4 and {least} to train on), got 3"
    with pytest.raises(ValueError, match="^dataset must have at least " + re.escape(wanted)):
        load_designs(config(write_folder(tmp_path, BINARY[:3]), num_train_designs=num_train))


def test_a_dataset_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^dataset must exist, got the parquet file"):
        load_designs(config(tmp_path / "absent.parquet"))
    with pytest.raises(
        ValueError, match="^dataset must be 'random_composites', a folder of images or of parquet files, a"
    ):
        load_designs(config(tmp_path / "no-such-folder"))
