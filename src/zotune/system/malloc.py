"""How the C library's heap keeps what is freed: settings that spare memory, and time, where a process runs a model.

It matters on a CPU, where tensors are the C library's memory; on glibc alone, and nothing is done elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Bytes at the end of the heap that are free and yet kept.
KEPT_FREE = 64 << 20
# Memory of so many bytes or more has pages of its own, which go back to the system when it is freed.
OWN_PAGES = 1 << 20
# The same, and the most there can be, while passes run that are forward only: of activations on fresh pages a step took
# up to half as long again.
OWN_PAGES_OF_PASSES = 32 << 20

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_keeps = False


def tune_malloc(own_pages: int = OWN_PAGES) -> None:
    """Let the C library keep what is freed in small pieces for the next request, and give back large ones at once.

    Left to itself, the library comes to put pieces of up to 32 MiB into one heap, where what stays leaves holes between
    what is freed, many while a model is read and with back-propagation (glibc 2.36). For processes that do nothing else
    than run a model; nothing where it is not glibc.

    Args:
        own_pages: bytes from which on memory goes back at once: `OWN_PAGES`, or `OWN_PAGES_OF_PASSES` where all that
            follows is forward passes.
    """
    global _keeps
    _keeps = _set(_M_MMAP_THRESHOLD, own_pages) and _set(_M_TRIM_THRESHOLD, KEPT_FREE)


def keep_activations() -> None:
    """From now on keep larger pieces too, if `tune_malloc` was called: forward passes request them again and again."""
    if _keeps:
        _set(_M_MMAP_THRESHOLD, OWN_PAGES_OF_PASSES)


def heap_environment() -> dict[str, str]:
    """Environment variables that keep the heap of a new process less fragmented; empty where none help.

    Before 2.38 glibc cuts splinters off memory that is to be aligned, as all of torch's is, and keeps them in a cache:
    a freed piece between two of them is not joined with its neighbours and serves no request of its own size. With
    adapters that held up to a quarter of the model's memory. Some holes remain where small pieces that stay come to lie
    between large ones. The library reads the variable as it starts.
    """
    name, off = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"
    given = os.environ.get(name, "")
    if not _leaves_holes(_libc()) or "tcache_count" in given:
        return {}
    return {name: ":".join(filter(None, [given, off]))}


def restart_with_heap_environment() -> None:
    """Restart this process with the same command and `heap_environment`, where that helps its heap."""
    better = heap_environment()
    if better and sys.orig_argv[1:]:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **better})


def _libc() -> str:
    """The C library and its version, as `glibc 2.36`."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):
        return ""


def _leaves_holes(libc: str) -> bool:
    name, _, version = libc.partition(" ")
    return name == "glibc" and [int(n) for n in version.split(".")[:2]] < [2, 38]


def _set(option: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(option, value))
    except (OSError, AttributeError):
        return False
