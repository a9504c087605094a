"""The heap's settings: where they are set, and that a process is begun anew once; what they spare: test_measure.py."""

import os
import subprocess
import sys

import pytest

from zotune.system import malloc as heap

_GLIBC = heap._leaves_holes(heap._libc())
_OFF = "glibc.malloc.tcache_count=0"


@pytest.mark.parametrize(
    "libc, given, wanted",
    [
        ("glibc 2.36", None, {"GLIBC_TUNABLES": _OFF}),
        ("glibc 2.4", "", {"GLIBC_TUNABLES": _OFF}),
        ("glibc 2.37", "glibc.malloc.arena_max=1", {"GLIBC_TUNABLES": f"glibc.malloc.arena_max=1:{_OFF}"}),
        ("glibc 2.36", "glibc.malloc.tcache_count=7", {}),
        ("glibc 2.38", None, {}),
        ("glibc 3.0", None, {}),
        ("musl 1.2", None, {}),
        ("", None, {}),
    ],
)
def test_thread_caches_are_off_where_they_leave_holes_and_nobody_has_said_otherwise(monkeypatch, libc, given, wanted):
    monkeypatch.setattr(heap, "_libc", lambda: libc)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    assert heap.heap_environment() == wanted


@pytest.mark.skipif(not _GLIBC, reason="this C library leaves no holes")
def test_a_process_is_begun_anew_once_as_the_same_process_with_the_same_command(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom zotune.system.malloc import restart_with_heap_environment\n"
        "print(os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES'), flush=True)\n"
        "restart_with_heap_environment()\nprint('ran')\n"
    )
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    run = subprocess.Popen([sys.executable, script, "a b", "--c"], env=plain, stdout=subprocess.PIPE, text=True)
    said, _ = run.communicate(timeout=60)
    assert said.splitlines() == [f"{run.pid} ['a b', '--c'] {env}" for env in (None, _OFF)] + ["ran"]
