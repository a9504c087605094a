"""A file that is written atomically is whole, the new one or the old one, whatever happens to its writer."""

import signal

import pytest

from zotune.system.atomic_write import atomic_write


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("a part")
        raise error
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "old"}


def test_a_file_that_cannot_replace_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "folder") as temporary:
        temporary.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_the_new_file_appears_when_the_context_ends_and_not_before(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent.parent == path.parent
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "whole"}


KILLED = """
import os, pathlib, signal, sys
from zotune.system.atomic_write import atomic_write

with atomic_write(pathlib.Path(sys.argv[1])) as temporary:
    temporary.write_text("a part")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path, start):
    path = tmp_path / "a.txt"
    path.write_text("old")
    assert start("-c", KILLED, path).wait(timeout=60) == -signal.SIGKILL
    assert path.read_text() == "old"
