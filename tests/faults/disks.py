"""A disk that is full from some write on: the command says so, loses nothing, and goes on once there is room again."""

import errno
import re
import resource
import signal

from faults import process, tracing
from faults.commands import COMMANDS, differences, plan, prepare  # noqa: F401 - kinds have a plan

# Errors of disks, and of a quota; the last one where a file may not become larger.
ERRORS = {errno.ENOSPC: "No space left", errno.EDQUOT: "quota", errno.EIO: "Input/output"}
SAID = re.compile("|".join([*ERRORS.values(), "File too large", "MB free", "cannot be written", "could not be"]), re.I)


def trial(place, name, chance):
    """Fill the disk on a command's way; then run it again with room, and compare."""
    command = COMMANDS[name]
    wanted, writes = place.reference(name)
    place.furnish(command)
    if tracing.can_trace():
        error = chance.choice([errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EIO])
        ended = place.traced(command.args, tracing.full_from(chance.randint(1, writes), chance, error))
    else:
        ended = process.run(command.args, place.log, lambda: (prepare(), limit_files(chance.randrange(1, 300))))
    assert ended.code in (0, 1, 2), (ended.code, ended.said)
    assert "Traceback" not in ended.said, ended.said
    assert ended.code == 0 or SAID.search(ended.said), (ended.code, ended.said)
    if ended.code == 0 and not (found := differences(place.snapshot(), wanted)):
        return 1
    assert ended.code or SAID.search(ended.said), f"nothing was said: {found}\n{ended.said}"
    again = place.run((*command.args, *command.again))
    found = differences(place.snapshot(), wanted)
    assert again.code == 0 or (again.code == 2 and not found), (again.code, ended.said, again.said)
    assert not found, f"{found}\n{ended.said}\n{again.said}"
    return 1


def limit_files(kilobytes):
    """Let no file become larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))
