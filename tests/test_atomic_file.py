import pytest

from mechdiffusers.atomic_file import atomic_write


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


def test_two_processes_at_the_same_file_leave_it_whole(tmp_path, monkeypatch):
    path = tmp_path / "made" / "part.npy"
    with atomic_write(path, shared=True) as ours:
        ours.write_text("the first")
        monkeypatch.setattr("os.getpid", lambda: -1)
        with atomic_write(path, shared=True) as theirs:
            theirs.write_text("half")
            assert ours.read_text() == "the first"
        assert path.read_text() == "half"
    assert path.read_text() == "the first"
    assert list(path.parent.iterdir()) == [path]
