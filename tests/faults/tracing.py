"""Stopping a child before a system call that changes files, chosen by number: to kill it there, or to fill its disk.

A seccomp filter (seccomp(2)) in the child stops it, for its parent to see (ptrace(2)), before each call that creates,
writes, moves, removes or syncs files, from whichever language; all others run at full speed. Linux on x86-64 only.
"""

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from contextlib import suppress

from faults.process import SECONDS, Ended, begin, said, within

# Calls by number: that write to a descriptor (those of stdout and stderr pass), that open with flags in an argument,
# and others. Those in _TAKE_SPACE fail on a full disk.
_WRITES = {1: "write", 18: "pwrite64", 20: "writev", 296: "pwritev", 40: "sendfile", 285: "fallocate", 77: "ftruncate"}
_SYNCS = {74: "fsync", 75: "fdatasync"}
_OPENS = {2: 1, 257: 2}  # open, openat: the argument that holds the flags
_NAMES = {82: "rename", 264: "renameat", 316: "renameat2", 87: "unlink", 263: "unlinkat", 84: "rmdir"}
_MAKES = {
    83: "mkdir",
    258: "mkdirat",
    86: "link",
    265: "linkat",
    88: "symlink",
    266: "symlinkat",
    326: "copy_file_range",
}
_TAKE_SPACE = {*_WRITES, *_SYNCS, *_OPENS, *_MAKES} - {77}
_OPEN, _OTHER, _WRITE = 3, 2, 1

_TRACEME, _CONT, _GETREGS, _SETREGS, _SETOPTIONS, _GETEVENTMSG = 0, 7, 12, 13, 0x4200, 0x4201
_OPTIONS = 0x100000 | 0x80 | 0x2 | 0x4 | 0x8  # end with the parent; seccomp, fork, vfork, clone
_SECCOMP_STOP = signal.SIGTRAP | 7 << 8
_ALL_CHILDREN = 0x40000000
_RAX, _RDX, _ORIG_RAX = 10, 12, 15
_libc = ctypes.CDLL(None, use_errno=True)


def can_trace():
    """Whether children can be stopped at their writes here."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and _ptrace_works()


def _ptrace_works():
    pid = os.fork()
    if not pid:
        os._exit(0 if _libc.ptrace(_TRACEME, 0, 0, 0) == 0 and _filter() else 1)
    return os.waitpid(pid, 0)[1] == 0


def _program():
    """The filter: load the number; each number's test jumps to a stop, which is behind them all."""
    load, equal, greater, bit, leave = 0x20, 0x15, 0x25, 0x45, 0x06
    allow, stop = 0x7FFF0000, 0x7FF00000
    code = [(load, 0, 0, 0)]
    for number in _WRITES:  # load the descriptor; at most 2: allow
        code += [
            (equal, 0, 4, number),
            (load, 0, 0, 16),
            (greater, 0, 1, 2),
            (leave, 0, 0, stop | _WRITE),
            (leave, 0, 0, allow),
        ]
    for number, argument in _OPENS.items():  # O_CREAT
        code += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument), (bit, 0, 1, os.O_CREAT)]
        code += [(leave, 0, 0, stop | _OPEN), (leave, 0, 0, allow)]
    for number in (*_SYNCS, *_NAMES, *_MAKES):
        code += [(equal, 0, 1, number), (leave, 0, 0, stop | _OTHER)]
    return [*code, (leave, 0, 0, allow)]


def _filter():
    """Install the filter in this process; whether that worked."""
    program = _program()
    content = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    # struct sock_fprog: a length, padding, a pointer
    record = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(content)))
    return _libc.prctl(38, 1, 0, 0, 0) == 0 and _libc.prctl(22, 2, record, 0, 0) == 0


def _ptrace(request, pid, data=0):
    """Ask for something of a stopped thread; `data` is a number, or a place in memory."""
    if _libc.ptrace(request, pid, None, ctypes.c_void_p(data) if isinstance(data, int) else data):
        raise ProcessLookupError(ctypes.get_errno(), "ptrace")


class Registers:
    """A stopped thread's registers."""

    def __init__(self, pid):
        self._pid, self.values = pid, (ctypes.c_ulong * 27)()
        _ptrace(_GETREGS, pid, self.values)

    def write(self, changes):
        for place, value in changes.items():
            self.values[place] = ctypes.c_ulong(value).value
        _ptrace(_SETREGS, self._pid, self.values)


def nothing(number, kind, pid):
    """Let every call pass."""


def kill_at(when, chance, *, torn=0.5):
    """Kill the child before its call number `when`, or cut that short if it is a write, and kill the child after it."""
    cut = []

    def act(number, kind, pid):
        if number >= when and kind == _WRITE and not cut and chance.random() < torn:
            registers = Registers(pid)
            if registers.values[_ORIG_RAX] in (1, 18) and registers.values[_RDX] > 1:
                registers.write({_RDX: chance.randrange(1, registers.values[_RDX])})
                cut.append(number)
                return None
        return "kill" if number >= when else None

    return act


def full_from(when, chance, error=errno.ENOSPC):
    """From call number `when` on nothing more fits on the disk; what was being written fits in part."""
    cut = []

    def act(number, kind, pid):
        if number < when:
            return
        registers = Registers(pid)
        call = registers.values[_ORIG_RAX]
        if call in (1, 18) and not cut and registers.values[_RDX] > 1 and chance.random() < 0.5:
            cut.append(number)
            registers.write({_RDX: chance.randrange(1, registers.values[_RDX])})
        elif call in _TAKE_SPACE:
            registers.write({_ORIG_RAX: -1, _RAX: -error})

    return act


def traced(args, log, act=nothing, prepare=lambda: None):
    """Run the command line with `act` called before each call that changes files: its number from 1, kind, thread.

    `act` returns "kill" to end the child there, before the call.
    """

    def stopped():
        prepare()
        _libc.ptrace(_TRACEME, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        assert _filter()

    child = begin(args, log, stopped)
    with within(SECONDS, child, log):
        os.waitpid(child, 0)
        _ptrace(_SETOPTIONS, child, _OPTIONS)
        _resume(child)
        code, writes = _follow(child, act)
    return Ended(code, said(log), writes)


def _follow(child, act):
    """Let a traced child run to its end; its exit code, and the number of its calls that change files."""
    writes, code = 0, None
    while code is None:
        pid, status = os.waitpid(-1, _ALL_CHILDREN)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            code = os.waitstatus_to_exitcode(status) if pid == child else None
            continue
        deliver = 0
        if status >> 8 == _SECCOMP_STOP:
            writes += 1
            with suppress(ProcessLookupError):
                if act(writes, _kind(pid), pid) == "kill":
                    os.kill(child, signal.SIGKILL)
                    continue
        elif status >> 16 == 0 and os.WSTOPSIG(status) not in (signal.SIGTRAP, signal.SIGSTOP):
            deliver = os.WSTOPSIG(status)
        _resume(pid, deliver)
    return code, writes


def _kind(pid):
    message = ctypes.c_ulong()
    _ptrace(_GETEVENTMSG, pid, ctypes.byref(message))
    return message.value


def _resume(pid, number=0):
    with suppress(ProcessLookupError):
        _ptrace(_CONT, pid, number)
