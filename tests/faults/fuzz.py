"""Damaged and crafted files in processes with little memory: each ends in exit code 0, 1 or 2 and a message in words.

A child takes a few hundred files one after another, and says before each which it is, so that one that kills its
process, or takes too long, is known by its number. `file(kind, number)` makes the same file again.
"""

import contextlib
import io
import os
import random
import re
import signal
import sys
import traceback
from collections import Counter

from faults import fuzz_files, process
from faults.fuzz_files import KINDS

BATCH = 200
# A file of a few kilobytes must do with this much more memory than the process had, and so much time.
MEMORY, SECONDS = 1 << 30, 30
answers = {}
"""How often each kind of file was answered with which exit code."""
TRACEBACK = re.compile(r"Traceback|\bbug\b")
# A kind's share of all files.
SHARES = {"ledger": 360, "recipe": 260, "rows": 260, "config": 25, "adapter": 25, "gguf": 30, "page": 10, "table": 10}
SHARES |= {"index": 5, "replayed ledger": 5, "cell": 5, "saved": 4, "resumed": 1}


class FilesFailedError(AssertionError):
    """Some files of a batch were not answered as they should; `count` is the number of all its files."""

    def __init__(self, count, failed):
        super().__init__(f"{len(failed)} of {count}\n" + "\n".join(failed))
        self.count = count


def plan(count, chance):
    """Batches: each a kind, its first number, and how many."""
    batches = []
    for kind, share in SHARES.items():
        total = -(-count * share // sum(SHARES.values()))
        batches += [f"{kind} {first} {min(BATCH, total - first)}" for first in range(0, total, BATCH)]
    chance.shuffle(batches)
    return batches


def trial(place, batch, chance):
    """Run a batch; how many files it had."""
    kind, first, count = re.fullmatch(r"(.+) (\d+) (\d+)", batch).groups()
    fuzz_files.furnish(place, kind)
    numbers, failed = list(range(int(first), int(first) + int(count))), []
    while numbers:
        done, why = run_some(place, kind, numbers)
        numbers = numbers[done:]
        if why:
            failed.append(why)
            print(why, file=sys.stderr, flush=True)
    if failed:
        raise FilesFailedError(int(count), failed)
    return int(count)


def run_some(place, kind, numbers):
    """Let a child take files until one fails; how many it took, and why the last one failed if it did."""
    reader, writer = os.pipe()

    def work():
        os.close(reader)
        process.limit_memory(MEMORY)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with fuzz_files.shortened(kind):
            for number in numbers:
                signal.alarm(SECONDS)
                code, why = outcome(place, kind, number)
                os.write(writer, b"!" + why.encode(errors="replace")[-3000:] if why else str(code).encode())
                if why:
                    break
        return 0

    pid = process.fork(work, place.log)
    os.close(writer)
    content = b""
    while part := os.read(reader, 65536):
        content += part
    os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    good, bad, why = content.partition(b"!")
    answers.setdefault(kind, Counter()).update(good.decode())
    if bad:
        return len(good) + 1, f"{kind} {numbers[len(good)]}: {why.decode(errors='replace')}"
    if len(good) < len(numbers):
        last = process.said(place.log)[-1000:]
        return len(good) + 1, f"{kind} {numbers[len(good)]}: the process ended with {code} {last}"
    return len(good), None


def outcome(place, kind, number):
    """Give one file to the command that reads it; the exit code, and what is wrong with the answer, or None."""
    out, err = io.StringIO(), io.StringIO()
    chance = random.Random(f"{kind} {number}")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            args = KINDS[kind](place.here, chance)
            code = answer(args)
    except BaseException:
        return 70, traceback.format_exc()
    return code, complaint(code, out.getvalue() + err.getvalue())


def complaint(code, said):
    """What is wrong with an answer, or None."""
    if code not in (0, 1, 2):
        return f"exit code {code}: {said}"
    if TRACEBACK.search(said):
        return said
    if "out of memory" in said:
        return f"a small file took more than {MEMORY >> 20} MiB: {said}"
    return f"exit code {code} without a message" if code and not said.strip() else None


def answer(args):
    """The exit code of a command line, or of a function that stands for one."""
    try:
        return process.cli.run([str(arg) for arg in args])
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
