"""Killed at any write, or at any time, once or more; then the command is run again and ends as if nothing had been."""

import os
import signal
import time

from faults import process, tracing
from faults.commands import COMMANDS, differences, plan, prepare  # noqa: F401 - kinds have a plan


def trial(place, name, chance):
    """Kill a command, run it again, compare; how many processes were killed."""
    command = COMMANDS[name]
    wanted, writes = place.reference(name)
    place.furnish(command)
    kills, args = 0, command.args
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        ended = killed(place, args, writes, chance)
        kills += ended.was_killed
        assert ended.was_killed or ended.code in (0, 2), (ended.code, ended.said)
        args = (*command.args, *command.again)
    ended = place.run(args)
    found = differences(place.snapshot(), wanted)
    # What was complete before the kill may be refused the second time.
    assert ended.code == 0 or (ended.code == 2 and not found), (ended.code, ended.said)
    assert not found, f"{found}\n{ended.said}"
    return kills


def killed(place, args, writes, chance):
    """Run a command and kill it on its way, if it does not end before."""
    if tracing.can_trace() and chance.random() < 0.8:
        return place.traced(args, tracing.kill_at(chance.randint(1, writes), chance))
    pid = process.begin(args, place.log, prepare)
    time.sleep(chance.uniform(0, 0.7))
    os.kill(pid, signal.SIGKILL)
    return process.end(pid, place.log)
