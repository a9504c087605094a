"""Two commands at once on one folder: it ends as after one of them, or after one and then the other."""

import time
from functools import cache
from itertools import permutations

from faults import process
from faults.commands import COMMANDS, LORA, STEPS, TRAIN, Command, differences, prepare

RESUME = (*TRAIN, *LORA, "--output-dir", "half", "--resume")
UNDO = ("ledger", "undo", "half", "--to-step", 2)
HALF, TWO = ("half",), ("run", "other")
EXPORT, MERGE = COMMANDS["export"].args, COMMANDS["merge"].args
EVAL = ("eval", "--model", "half", "--eval-file", "rows.jsonl", "--output-dir", "out")
PAIRS = {
    "train, train": (Command((*TRAIN, *LORA)), (*TRAIN, *LORA)),
    "resume, resume": (Command(RESUME, (), HALF), RESUME),
    "resume, undo": (Command(RESUME, (), HALF), UNDO),
    "undo, undo": (Command(UNDO, (), HALF), ("ledger", "undo", "half", "--to-step", 1)),
    "resume, verify": (Command(RESUME, (), HALF), ("ledger", "verify", "half")),
    "undo, show": (Command(UNDO, (), HALF), ("ledger", "show", "half")),
    "resume, export": (Command(RESUME, (), HALF), ("ledger", "export", "half", "--output-dir", "out")),
    "resume, eval": (Command(RESUME, (), HALF), EVAL),
    "eval, eval": (Command(EVAL, (), HALF), EVAL),
    "replay, replay": (
        Command(("ledger", "replay", "run", "--output-dir", "out"), (), TWO),
        ("ledger", "replay", "other", "--output-dir", "out"),
    ),
    "export, merge": (Command(EXPORT, (), TWO), MERGE),
    "merge, merge": (Command(MERGE, (), TWO), (*MERGE, "--average")),
    "train, replay": (Command((*TRAIN, *LORA), (), ("whole",)), COMMANDS["replay"].args),
    "two new runs over an old one": (
        Command((*TRAIN, *LORA, "--output-dir", "run", "--seed", 7, "--overwrite-output-dir"), (), ("run",)),
        (*TRAIN, *LORA, "--output-dir", "run", "--seed", 8, "--max-steps", STEPS // 2, "--overwrite-output-dir"),
    ),
    "bench, bench": (COMMANDS["bench"], COMMANDS["bench"].args),
}


def plan(count, chance):
    names = list(PAIRS)
    return [names[i % len(names)] for i in range(count)]


@cache
def allowed(place, name):
    """What the folder may hold at the end: of each command alone, and of both in each order."""
    first, second = PAIRS[name]
    found = []
    for order in (*permutations((first.args, second)), (first.args,), (second,)):
        place.furnish(first)
        for args in order:
            place.run(args)
        found.append(place.snapshot())
    return found


def trial(place, name, chance):
    """Start both commands, one a little later than the other."""
    first, second = PAIRS[name]
    outcomes = allowed(place, name)
    place.furnish(first)
    logs = [place.area / f"log{i}" for i in range(2)]
    pids = []
    for args, log in zip(chance.sample([first.args, second], 2), logs, strict=True):
        pids.append(process.begin(args, log, prepare))
        time.sleep(chance.choice([0, chance.uniform(0, 0.4)]))
    ended = [process.end(pid, log) for pid, log in zip(pids, logs, strict=True)]
    said = "\n".join(f"{e.code}: {e.said}" for e in ended)
    assert {e.code for e in ended} <= {0, 1, 2}, said
    assert 0 in {e.code for e in ended}, said
    assert "Traceback" not in said, said
    snapshot = place.snapshot()
    found = [differences(snapshot, wanted) for wanted in outcomes]
    assert "" in found, f"{min(found, key=len)}\n{said}"
    return 1
