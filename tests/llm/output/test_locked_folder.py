"""Only what zotune wrote is replaced or deleted, by one command at a time, and all of it or nothing.

Each attack looks at the folder from outside: its files are compared byte for byte with copies made before.
"""

import errno
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zotune.errors import UsageError
from zotune.llm.output import locked_folder
from zotune.llm.output.locked_folder import LockedFolder, new_folder, tidy
from zotune.llm.output.manifest import FILE, digest_of, read_manifest
from zotune.llm.output.model_files import old_weights
from zotune.system import scratch_folder as scratch
from zotune.system.atomic_write import atomic_write
from zotune.system.scratch_folder import scratch_folder


def contents(folder):
    """All files below a folder by relative path, but for the manifest."""
    files = {p for p in folder.rglob("*") if p.is_file() and p.name != FILE}
    return {str(p.relative_to(folder)): p.read_text() for p in files}


def write(folder, **files):
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.fixture
def out(tmp_path):
    """A folder in which zotune wrote a, b and a folder c, and the user wrote mine."""
    folder = tmp_path / "out"
    with LockedFolder(folder) as locked, locked.staged() as new:
        write(new, a="old a", b="old b")
        (new / "c").mkdir()
        write(new / "c", d="old d")
    write(folder, mine="mine")
    return folder


OLD = {"a": "old a", "b": "old b", "c/d": "old d", "mine": "mine"}
NEW = {"a": "new a", "c/e": "new e", "f": "new f", "mine": "mine"}


def replace_all(folder):
    with LockedFolder(folder) as locked, locked.staged(without=["b"]) as new:
        write(new, a="new a", f="new f")
        (new / "c").mkdir()
        write(new / "c", e="new e")


def test_new_files_replace_what_zotune_wrote_and_nothing_else(out):
    assert contents(out) == OLD
    replace_all(out)
    assert contents(out) == NEW
    assert set(read_manifest(out).files) == {"a", "c", "f"}
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_a_file_of_the_users_in_the_way_is_renamed(out):
    write(out, f="mine too", a="changed")
    (out / "c" / "notes").write_text("mine")
    write(out, **{"a.saved": "older"})
    replace_all(out)
    found = contents(out)
    assert found.items() >= NEW.items()
    assert {k: v for k, v in found.items() if k not in NEW} == {
        **{"a.saved": "older", "a.saved2": "changed", "f.saved": "mine too"},
        **{"c.saved/d": "old d", "c.saved/notes": "mine"},
    }


def test_a_file_to_delete_that_the_user_changed_stays(out):
    write(out, b="changed")
    replace_all(out)
    assert contents(out) == {**NEW, "b": "changed"}


def test_a_large_file_that_was_trained_on_is_not_ours(tmp_path):
    path = tmp_path / "weights"
    content = bytearray(os.urandom(3 * 2**20))
    path.write_bytes(content)
    before = digest_of(path)
    path.write_bytes(bytes(b ^ 1 for b in content))
    assert digest_of(path) != before


# Kills -------------------------------------------------------------------------------------------------------

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "open"}


def die_before_change(number):
    """Let this process die before its change of that number: a file or folder made, opened to write, moved or gone."""
    calls = []

    def hook(event, args):
        writes = event != "open" or (isinstance(args[1], str) and set(args[1]) & set("wxa"))
        if event in CHANGES and writes:
            calls.append(event)
            if len(calls) == number:
                os._exit(9)

    sys.addaudithook(hook)


def kills(command, folder, tmp_path):
    """The folder after each possible kill of the command, the first one first, and then after its end."""
    for number in range(1, 200):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        child = os.fork()
        if not child:
            try:
                die_before_change(number)
                command(copy)
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        yield copy, code == 9
        if code == 0:
            return
    raise AssertionError("the command does not end")


def test_a_kill_at_any_step_of_a_swap_leaves_the_old_files_or_the_new_ones(out, tmp_path):
    found = []
    for folder, _ in kills(replace_all, out, tmp_path):
        tidy(folder)
        assert contents(folder) in (OLD, NEW)
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        found.append(contents(folder) == NEW)
    assert found == sorted(found) and len(found) > 12 and set(found[:-1]) == {True, False}


def start_over(folder):
    with LockedFolder(folder) as locked:
        locked.start_over("ledger")
        with locked.staged() as new:
            write(new, **{"config.yaml": "new"})


def test_a_run_that_starts_over_loses_nothing_before_its_model_is_saved(out, tmp_path):
    for folder, killed in kills(start_over, out, tmp_path):
        tidy(folder)
        aside = [p for p in folder.iterdir() if p.name.startswith(".")]
        if aside:
            assert contents(aside[0]) == {k: v for k, v in OLD.items() if k != "mine"}
            assert set(contents(folder)) >= {"mine", "config.yaml"}
        else:
            assert contents(folder) == OLD and killed
    with LockedFolder(folder) as locked, locked.staged(is_whole=True) as new:
        write(new, a="new a")
    assert contents(folder) == {"mine": "mine", "config.yaml": "new", "a": "new a"}
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def go_back(folder):
    with LockedFolder(folder) as locked:
        locked.go_back()


def test_a_run_that_goes_back_leaves_every_byte(out, tmp_path):
    before = (out / FILE).read_bytes()
    start_over(out)
    for folder, killed in kills(go_back, out, tmp_path):
        tidy(folder)
        if not killed or "config.yaml" not in contents(folder):
            assert contents(folder) == OLD
            assert (folder / FILE).read_bytes() == before


def test_a_file_to_remove_is_there_or_gone(out, tmp_path):
    for folder, _ in kills(lambda folder: LockedFolder(folder).remove("c", "mine"), out, tmp_path):
        tidy(folder)
        assert contents(folder) in (OLD, {k: v for k, v in OLD.items() if k != "c/d"})
    assert "c" not in read_manifest(folder).files


def test_what_a_dead_process_left_is_removed_by_the_next_one_and_not_what_a_living_one_has(tmp_path):
    with scratch_folder(tmp_path) as living:
        child = os.fork()
        if not child:
            with scratch_folder(tmp_path) as dead:
                (dead / "half").write_text("half")
                os._exit(0)
        os.waitpid(child, 0)
        assert len(list(tmp_path.iterdir())) == 2
        with atomic_write(tmp_path / "a") as temporary:
            assert {p.name for p in tmp_path.iterdir()} == {living.name, temporary.parent.name}
            temporary.write_text("whole")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "whole"}


def test_what_another_machine_makes_is_left_alone_for_a_day(tmp_path):
    """Its locks cannot be seen from here."""
    for name, age in (("fresh", 3600), ("old", 25 * 3600)):
        folder = tmp_path / f".zotune-00000000-{'f' if name == 'fresh' else '0':0>16}"
        folder.mkdir()
        os.utime(folder, times=(time.time() - age,) * 2)
    with scratch_folder(tmp_path):
        pass
    assert [p.name[-1] for p in tmp_path.iterdir()] == ["f"]


# One writer --------------------------------------------------------------------------------------------------


def test_a_folder_has_one_writer(tmp_path):
    with new_folder(tmp_path / "out") as first:
        for opened in (LockedFolder, new_folder, LockedFolder):
            with pytest.raises(UsageError, match="another run is writing to"), opened(tmp_path / "out"):
                pass
        with first.staged() as new:
            write(new, a="a")
    assert contents(tmp_path / "out") == {"a": "a"}
    with pytest.raises(UsageError, match=r"is not empty \(a\)"), new_folder(tmp_path / "out"):
        pass


def test_a_refused_command_leaves_no_folder_behind(tmp_path):
    with LockedFolder(tmp_path / "x" / "y"):
        assert (tmp_path / "x" / "y").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locked_folder.fcntl, "flock", no_locks)
    with pytest.raises(UsageError, match="has no file locks"):
        LockedFolder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Links and permissions ---------------------------------------------------------------------------------------


def test_a_link_at_a_scratch_name_is_not_followed(tmp_path, monkeypatch):
    """The attacker knows the next names, and puts links to a folder of the victim's there."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir(), out.mkdir()
    write(victim, model="precious")
    tokens = [f"{i:016x}" for i in range(9)]
    for token in tokens[:3]:
        for prefix in (".zotune-", ".zotune-swap-", ".zotune-replaced-"):
            (out / f"{prefix}{scratch.machine()}-{token}").symlink_to(victim)
    names = iter(tokens)
    monkeypatch.setattr(scratch.secrets, "token_hex", lambda _: next(names))
    with LockedFolder(out) as locked, locked.staged() as new:
        assert not new.is_symlink() and new.name.endswith(tokens[3])
        write(new, a="a")
    assert {p.name: p.read_text() for p in victim.iterdir()} == {"model": "precious"}
    assert (out / "a").read_text() == "a"


def test_a_link_in_the_place_of_a_file_is_renamed_and_what_it_leads_to_stays(out, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (out / "a").unlink()
    (out / "a").symlink_to(precious)
    replace_all(out)
    assert precious.read_text() == "precious" and (out / "a.saved").is_symlink()
    assert (out / "a").read_text() == "new a" and not (out / "a").is_symlink()


@pytest.mark.parametrize("name", ["../victim", "/etc", "..", "", "c/d", "a\0b"])
def test_a_manifest_leads_nowhere_but_into_its_folder(out, name):
    text = (out / FILE).read_text().replace('"b"', json.dumps(name))
    (out / FILE).write_text(text)
    assert read_manifest(out) is None
    with LockedFolder(out) as locked:
        assert not locked.manifest.files


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_is_written_obeys_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with LockedFolder(tmp_path / "out") as locked, locked.staged() as new:
            save_file({"x": torch.zeros(1)}, new / "model.safetensors")
            Path(tempfile.mkdtemp(dir=new)).rename(new / "checkpoint-1")
            write(new / "checkpoint-1", a="a")
        with atomic_write(tmp_path / "b.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        allowed = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == allowed & ~umask, path


def test_a_new_file_does_not_replace_one_that_appeared_meanwhile(tmp_path):
    path = tmp_path / "predictions"
    with pytest.raises(FileExistsError), atomic_write(path, replace=False) as temporary:
        temporary.write_text("ours")
        path.write_text("theirs")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"predictions": "theirs"}
    with atomic_write(tmp_path / "other", replace=False) as temporary:
        temporary.write_text("ours")
    assert (tmp_path / "other").read_text() == "ours"


def test_files_of_another_cut_do_not_stay_beside_what_is_saved(tmp_path):
    old = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "checkpoint.safetensors"}
    with LockedFolder(tmp_path) as locked:
        with locked.staged() as new:
            write(new, **dict.fromkeys(old, "old"))
        write(tmp_path, **{"notes.txt": "mine"})
        with locked.staged(without=old_weights(locked.manifest.files)) as new:
            write(new, **{"model.safetensors": "new"})
        expected = {"model.safetensors": "new", "notes.txt": "mine", "checkpoint.safetensors": "old"}
        assert contents(tmp_path) == expected
        with pytest.raises(OSError, match="full"), locked.staged() as new:
            write(new, **{"model.safetensors": "half"})
            raise OSError("full")
    assert contents(tmp_path) == expected
