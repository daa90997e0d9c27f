import pytest
from mechdiffusers.training.atomic_file import atomic_write


def test_a_file_that_could_not_be_written_leaves_the_one_before_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.json"

    def write(text: str, room: int) -> None:
        with atomic_write(path) as unfinished:
            unfinished.write_text(text[:room])
            if len(text) > room:
                raise OSError("disk full")

    write("first", room=5)
    with pytest.raises(OSError, match="disk full"):
        write("second", room=5)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
