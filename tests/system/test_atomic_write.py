"""A file that is written atomically is whole, the new one or the old one, whatever happens to its writer."""

import os
import signal
from pathlib import Path

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


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_takes_no_name_that_is_there_and_is_whole_once_it_has_one(tmp_path, monkeypatch, has_links):
    path = tmp_path / "a.txt"
    link, replace, contents = os.link, Path.replace, []

    def seen(change):
        def watched(*names):
            if not has_links and change is link:
                raise PermissionError("no links here")
            contents.append(path.read_text() if path.exists() else None)
            change(*names)
            contents.append(path.read_text())

        return watched

    monkeypatch.setattr(os, "link", seen(link))
    monkeypatch.setattr(Path, "replace", seen(replace))
    with atomic_write(path, replace=False) as temporary:
        temporary.write_text("whole")
    # Where there are links, no moment sees an empty file.
    assert contents == ([None, "whole"] if has_links else ["", "whole"])
    with pytest.raises(FileExistsError), atomic_write(path, replace=False) as temporary:
        temporary.write_text("another")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "whole"}
