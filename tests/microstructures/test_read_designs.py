import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mechdiffusers.microstructures import read_designs

RNG = np.random.default_rng(0)
TWO = RNG.random((5, 8, 10)) < 0.4
GREY = RNG.integers(0, 256, (5, 8, 10)).astype(np.uint8)
FIELD_FILES = Path(os.environ.get("FIELD_FILES_DIR", Path(__file__).parents[3] / "shared" / "data" / "field_files"))


def save(path: Path, image: np.ndarray, mode: str | None = None, **options) -> None:
    picture = Image.fromarray(image)
    (picture if mode is None else picture.convert(mode)).save(path, **options)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "gif"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_two_phases_are_read_from_every_lossless_format_and_mode(tmp_path, suffix, mode):
    if (suffix, mode) in {("gif", "RGBA"), ("bmp", "RGBA")}:
        pytest.skip("the format has no such mode")
    for index, design in enumerate(TWO):
        save(tmp_path / f"{index}.{suffix}", design.astype(np.uint8) * 255, mode)
    files = read_designs(tmp_path)
    assert files.levels.dtype == bool
    np.testing.assert_array_equal(files.levels, TWO)
    assert files.names == [f"{index}.{suffix}" for index in range(5)]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint16, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("suffix", ["npy", "npz", "tif"])
def test_label_maps_of_0_and_1_are_two_phases_whatever_their_type(tmp_path, dtype, suffix):
    labels = TWO.astype(dtype)
    if suffix == "npy":
        np.save(tmp_path / "x.npy", labels)
    elif suffix == "npz":
        np.savez(tmp_path / "x.npz", labels)
    elif dtype in (np.int8, np.int64, np.float64):
        pytest.skip("Pillow writes no such TIFF")
    else:
        pages = [Image.fromarray(label) for label in labels]
        pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    files = read_designs(tmp_path / f"x.{suffix}")
    assert files.levels.dtype == bool
    np.testing.assert_array_equal(files.levels, TWO)


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 128), (1, 2), (0, 65535), (300, 700)])
def test_two_levels_are_two_phases_whatever_their_values(tmp_path, low, high):
    dtype = np.uint8 if high < 256 else np.uint16
    for index, design in enumerate(TWO):
        save(tmp_path / f"{index}.png", np.where(design, high, low).astype(dtype))
    np.testing.assert_array_equal(read_designs(tmp_path).levels, TWO)


def test_grey_levels_of_8_bits_are_kept(tmp_path):
    for index, design in enumerate(GREY):
        save(tmp_path / f"{index}.png", design)
    np.testing.assert_array_equal(read_designs(tmp_path).levels, GREY)


def test_grey_levels_of_16_bits_and_floats_are_rounded_to_8(tmp_path, caplog):
    wide = GREY.astype(np.uint16) * 257
    np.save(tmp_path / "unit.npy", GREY / 255)
    for index, design in enumerate(wide):
        save(tmp_path / f"{index}.tif", design + np.uint16(100) * (design < 60000))
    (tmp_path / "unit.npy").rename(tmp_path.parent / "unit.npy")
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(read_designs(tmp_path).levels, GREY)
    assert "levels of 16 bits are rounded to 8" in caplog.text
    np.testing.assert_array_equal(read_designs(tmp_path.parent / "unit.npy").levels, GREY)


def test_every_page_of_a_stack_is_a_design(tmp_path):
    pages = [Image.fromarray(page.astype(np.uint8) * 255) for page in np.tile(TWO, (26, 1, 1))[:128]]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    files = read_designs(tmp_path / "stack.tif")
    np.testing.assert_array_equal(files.levels, np.tile(TWO, (26, 1, 1))[:128])
    assert files.names == [f"stack.tif#{index}" for index in range(128)]


def test_a_folder_may_be_nested_and_what_is_not_a_design_is_named(tmp_path, caplog):
    for folder, design in zip(("b", "a/deep", "."), TWO[:3], strict=True):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        save(tmp_path / folder / "x.png", design)
    (tmp_path / "b" / "notes.docx").write_bytes(b"?")
    (tmp_path / ".hidden.png").write_bytes(b"?")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").write_bytes(b"?")
    files = read_designs(tmp_path)
    assert files.names == ["a/deep/x.png", "b/x.png", "x.png"]
    np.testing.assert_array_equal(files.levels, TWO[[1, 0, 2]])
    assert "b/notes.docx" in caplog.text
    assert "hidden" not in caplog.text


def test_images_of_one_bit_and_of_eight_may_stand_together(tmp_path):
    save(tmp_path / "a.png", TWO[0])
    save(tmp_path / "b.png", TWO[1].astype(np.uint8) * 255)
    np.testing.assert_array_equal(read_designs(tmp_path).levels, TWO[:2])


def test_what_jpeg_does_to_black_and_white_is_undone(tmp_path, caplog):
    blocks = np.kron(TWO, np.ones((1, 5, 5), dtype=bool))
    for index, design in enumerate(blocks):
        save(tmp_path / f"{index}.jpg", design.astype(np.uint8) * 255, quality=95)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "0.jpg")))) > 2
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(read_designs(tmp_path).levels, blocks)
    assert "black and white, apart from what the lossy format changed" in caplog.text


THREE = RNG.integers(0, 3, (2, 8, 10)).astype(np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            [THREE[0]],
            r"got the 3 levels 0, 1, 2 in 0.png, .*: merge .* np.isin\(image, \[1, 2\]\)",
        ),
        ([np.minimum(THREE[0], 1), THREE[0]], "got the 3 levels 0, 1, 2 in 0.png and the others"),
        ([THREE[0] * np.uint8(100)], "got the 3 levels 0, 100, 200"),
        ([TWO[0].astype(np.uint8) * 255, TWO[1].astype(np.uint8)], "got the 3 levels 0, 1, 255"),
        (
            [(GREY[0] / 12).astype(np.uint8)],
            "use the range .* got levels from 0 to 21 alone in 0.png: stretch",
        ),
        ([GREY[0].astype(np.uint16)], "use the range from 0 to 65535"),
        ([np.zeros((8, 10), np.uint8)] * 2, "show two phases or grey levels, got the one level 0 throughout"),
        ([GREY[0], GREY[1].astype(np.uint16) * 257], "one kind of levels, got 0.png with levels up to 255 and 1.png"),
        ([np.dstack([GREY[0]] * 2 + [GREY[1]])], "grey or black and white, got 0.png in colour"),
        ([np.dstack([GREY[0]] * 4)], "opaque, got 0.png with transparent pixels"),
    ],
)
def test_unfit_images_are_refused_with_the_file_and_the_remedy(tmp_path, images, message):
    for index, image in enumerate(images):
        save(tmp_path / f"{index}.png", image)
    with pytest.raises(ValueError, match=f"^images must (be|have) .*{message}|^images must {message}"):
        read_designs(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.array([[0.0, np.nan], [0.5, 1.0]]),
            "images must be booleans, .* x.npy with values outside: divide",
        ),
        (np.linspace(0, 255, 64).reshape(8, 8), "images must be booleans, floats in"),
        (
            np.arange(-5, 59).reshape(8, 8),
            "images must be booleans, .* from 0 to 255, .*convert them to 8",
        ),
        (np.arange(64).reshape(8, 8) * 50, "images must be booleans, .* integers from 0 to 255"),
        (
            np.zeros((2, 2, 2, 2)),
            r"designs must be booleans, .* got x.npy with shape \(2, 2, 2, 2",
        ),
        (np.zeros(5), "designs must be booleans, integers or floats of shape"),
        (np.zeros((0, 4, 4)), "designs must be booleans, integers or floats of shape"),
        (np.array([["a", "b"]]), "designs must be booleans, integers or floats of shape"),
        (
            np.array([{"a": 1}]),
            "designs must be arrays of numbers .* got x.npy: Object arrays",
        ),
    ],
)
def test_unfit_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=f"^{message}"):
        read_designs(tmp_path / "x.npy")


@pytest.mark.parametrize("name", ["x.png", "x.npy", "x.npz", "x.tif"])
@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"hello"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"can be read, got {name}: "):
        read_designs(tmp_path)


def test_a_truncated_image_is_named(tmp_path):
    file = io.BytesIO()
    Image.fromarray(GREY[0]).save(file, "PNG")
    (tmp_path / "x.png").write_bytes(file.getvalue()[:60])
    with pytest.raises(ValueError, match="^images must be files that can be read, got x.png: "):
        read_designs(tmp_path)


def test_files_of_other_kinds_are_refused_with_what_to_do(tmp_path):
    np.savetxt(tmp_path / "cahn.txt", TWO[0])
    with pytest.raises(ValueError, match=r"got cahn.txt: np.save\('cahn.npy', np.loadtxt\('cahn.txt'\)\) makes"):
        read_designs(tmp_path / "cahn.txt")
    with pytest.raises(ValueError, match="^designs must be in a folder of .* got cahn.txt and 0 others"):
        read_designs(tmp_path)
    with pytest.raises(ValueError, match="^designs must be a file or a folder that exists, got .*nowhere"):
        read_designs(tmp_path / "nowhere")


def test_mixed_sizes_are_refused(tmp_path):
    save(tmp_path / "a.png", TWO[0])
    save(tmp_path / "b.png", TWO[1].T)
    with pytest.raises(ValueError, match="^designs must have one size, 8 x 10 as a.png, got b.png with 10 x 8: "):
        read_designs(tmp_path)


#: What becomes of each public file: the shape and type that it is read as, or why it is refused.
FIELD = {
    "mcrpy_copolymer_64.npy": (1, 64, 64),
    "mcrpy_carbonate.npy": (1, 256, 256),
    "mcrpy_composite_64.npy": "the 3 levels 0, 1, 2 .*: merge phases first",
    "superres_sem.tif": "the 3 levels 0, 1, 2 .*: merge phases first",
    "superres_sofc_stack.tif": "the 3 levels 0, 1, 2 .*: merge phases first",
    "inpainter_sofc.png": "the 3 levels 0, 128, 255 .*: merge phases first",
    "cahn_hilliard_400.txt": "np.save",
}


@pytest.mark.skipif(not FIELD_FILES.is_dir(), reason="needs the public files: FIELD_FILES_DIR names no folder of them")
@pytest.mark.parametrize("name", FIELD)
def test_public_files_of_this_field_are_read_or_refused_with_a_remedy(name):
    if isinstance(FIELD[name], str):
        with pytest.raises(ValueError, match=FIELD[name]):
            read_designs(FIELD_FILES / name)
    else:
        files = read_designs(FIELD_FILES / name)
        assert (files.levels.shape, files.levels.dtype) == (FIELD[name], bool)
        assert 0.05 < files.levels.mean() < 0.95
