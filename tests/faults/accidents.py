"""What else befalls a run: power cuts, flipped bits, signals, a folder that is removed; then it goes on, or is refused.

Either `--resume` ends with the files of the uninterrupted run, or it refuses with exit code 2 and the right message and
changes nothing.
"""

import os
import re
import shutil
import signal

from faults import process
from faults.commands import COMMANDS, RUNS, differences, prepare
from zotune.ledger import files
from zotune.llm.models.language_model import LanguageModel
from zotune.optim import recorded_steps


def plan(count, chance):
    return [f"{list(ACCIDENTS)[i % len(ACCIDENTS)]}: {chance.choice(list(RUNS))}" for i in range(count)]


def trial(place, name, chance):
    accident, _, run = name.partition(": ")
    wanted, _ = place.reference(run)
    place.furnish(COMMANDS[run])
    if ACCIDENTS[accident](place, COMMANDS[run].args, chance):
        return 1
    ended = place.run((*COMMANDS[run].args, "--resume"))
    assert ended.code == 0, (ended.code, ended.said)
    found = differences(place.snapshot(), wanted)
    assert not found, f"{found}\n{ended.said}"
    return 1


def at_call(owner, name, when, act):
    """Act before the call number `when` of a function."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            act()
        return real(*args, **kwargs)

    setattr(owner, name, call)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_within(place, args, chance):
    """Kill a run in a probe or in an update; its folder stays as a kill leaves it."""
    owner, name, most = chance.choice([(LanguageModel, "score", 30), (recorded_steps, "update_tensors_", 9)])
    return disturbed(place, args, lambda: at_call(owner, name, chance.randrange(1, most), die))


def disturbed(place, args, disturb):
    """Run with something that happens in the child on its way."""
    return process.run(args, place.log, lambda: (prepare(), disturb()))


def power_cut(place, args, chance):
    """Killed, and what was not synced is gone: any number of bytes at the end of the files that grow."""
    killed_within(place, args, chance)
    if (place.here / "out/results.json").exists():  # the run ended before, and all of it is synced
        return
    for name in ("ledger.zol", "metrics.jsonl"):
        path = place.here / "out" / name
        if not path.exists():
            continue
        content = path.read_bytes()
        least = header_size(content) if name == "ledger.zol" else 0
        # Some file systems leave zeros, or what was there before, where data did not reach the disk.
        tail = chance.choice([b"", bytes(chance.randrange(200)), chance.randbytes(50)])
        path.write_bytes(content[: chance.randrange(least, len(content) + 1)] + tail)
    (place.here / "out/checkpoint.safetensors").unlink(missing_ok=True)


def header_size(content):
    return 20 + int.from_bytes(content[12:16], "little")


def damaged(place, args, chance, damage, says):
    """Damage a ledger: whether going on is refused and changes nothing."""
    killed_within(place, args, chance)
    path = place.here / "out/ledger.zol"
    if not path.exists():
        return False
    path.write_bytes(damage(bytearray(path.read_bytes())))
    before = place.snapshot()
    ended = place.run((*args, "--resume"))
    if ended.code == 0:
        return False
    assert ended.code == 2, (ended.code, ended.said)
    assert re.search(says, ended.said), ended.said
    found = differences(place.snapshot(), before)
    assert not found, found
    return True


def bits_flipped(place, args, chance):
    """Some bits of the ledger flipped: refused, or a damaged tail cut."""

    def damage(content):
        for _ in range(chance.choice([1, 1, 1, 5])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        return content

    return damaged(
        place, args, chance, damage, "damaged|is no ledger|format version|ends within its header|good records"
    )


def header_truncated(place, args, chance):
    """The ledger ends within its header: refused."""

    def damage(content):
        return content[: chance.randrange(header_size(content))]

    return damaged(place, args, chance, damage, "is no ledger|ends within its header|empty")


def interrupted(place, args, chance):
    """SIGTERM or SIGINT: the run saves, says so with its exit code, and goes on later."""
    number, when = chance.choice([signal.SIGTERM, signal.SIGINT]), chance.randrange(8, 38)
    ended = disturbed(place, args, lambda: at_call(LanguageModel, "score", when, lambda: os.kill(os.getpid(), number)))
    assert ended.code in (0, 128 + number, -number), (ended.code, ended.said)


def folder_removed(place, args, chance):
    """The folder is removed meanwhile: the run ends with a message."""

    def disturb():
        at_call(LanguageModel, "score", chance.randrange(10, 40), lambda: shutil.rmtree(place.here / "out", True))
        files._SECONDS_BETWEEN_SYNCS = 0.0

    ended = disturbed(place, args, disturb)
    assert ended.code in (0, 1, 2), (ended.code, ended.said)
    assert "Traceback" not in ended.said, ended.said


ACCIDENTS = {
    "power cut": power_cut,
    "bits flipped": bits_flipped,
    "header truncated": header_truncated,
    "interrupted": interrupted,
    "folder removed": folder_removed,
}
