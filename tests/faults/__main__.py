"""The command: which kinds of faults, how many of each; see the package."""

import argparse
import fcntl
import json
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from faults import accidents, disks, fuzz, kills, pairs
from faults.commands import Place
from zotune.llm.output.environment import environment
from zotune.llm.output.json_files import write_json

KINDS = {"kills": kills, "pairs": pairs, "disks": disks, "accidents": accidents, "fuzz": fuzz}
COUNTS = {"kills": 600, "pairs": 100, "disks": 100, "accidents": 100, "fuzz": 100_000}
SECONDS_BETWEEN_LINES = 10


def inject(kind, count, seed, place):
    """Faults of a kind; yields after each what was tried, how many were counted, and what failed."""
    began, tried, counted, failed = time.monotonic(), Counter(), 0, []
    names = KINDS[kind].plan(count, random.Random(seed))
    for number, name in enumerate(names):
        tried[name] += 1
        try:
            counted += KINDS[kind].trial(place, name, random.Random(f"{seed} {kind} {number}"))
        except Exception as error:
            said = complaint_of(error)
            failed.append({"number": number, "name": name, "error": said[:3000]})
            counted += getattr(error, "count", 0)
            print(f"{kind} {number}, {name}: {said}"[: 300 if kind == "fuzz" else 3000], file=sys.stderr, flush=True)
        found = {"seed": seed, "count": counted, "failed": failed, "seconds": round(time.monotonic() - began)}
        yield {**found, ("exit_codes" if kind == "fuzz" else "tried"): fuzz.answers if kind == "fuzz" else dict(tried)}
        if kind == "kills" and counted >= count:  # some commands are killed twice
            return
        if kind == "kills" and number + 1 == len(names):  # a process that ended before it was killed counts for nothing
            names += KINDS[kind].plan(count - counted, random.Random(f"{seed} {number}"))


def complaint_of(error):
    said = str(error) if isinstance(error, AssertionError) else "".join(traceback.format_exception(error))
    return re.sub(r'File "/[^"]*/', 'File "', said)  # the same on every machine


def repeat(kind, found, place):
    """Try what failed again, with the same random numbers; what holds now is listed as mended."""
    failed, mended = [], [*found.get("mended", ())]
    for one in found["failed"]:
        try:
            KINDS[kind].trial(place, one["name"], random.Random(f"{found['seed']} {kind} {one['number']}"))
        except Exception as error:
            failed.append({**one, "error": complaint_of(error)[:3000]})
        else:
            mended.append(one)
    return {**found, "failed": failed, "mended": mended}


def report(output, kind, found):
    """Write what one kind found into the file of all kinds, which processes that inject other kinds may write too."""
    folder = os.open(output.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    known = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    known = {name: value for name, value in known.items() if name in KINDS}
    write_json(output, {**known, kind: found, "environment": environment()})
    os.close(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    for kind, count in COUNTS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help=f"number of {kind}; default: {count}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--again", action="store_true", help="only what failed in the file of --output")
    args = parser.parse_args()
    output, failed = args.output and args.output.resolve(), 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="zotune-faults-") as folder:
        place = Place(Path(folder).resolve())
        place.warm_up()
        for kind in args.only:
            told = time.monotonic()
            if args.again:
                found = repeat(kind, json.loads(output.read_text(encoding="utf-8"))[kind], place)
                report(output, kind, found)
                print(progress(kind, found, found["count"]), file=sys.stderr, flush=True)
                failed += len(found["failed"])
                continue
            for found in inject(kind, getattr(args, kind), args.seed, place):
                if time.monotonic() - told > SECONDS_BETWEEN_LINES:
                    told = time.monotonic()
                    print(progress(kind, found, getattr(args, kind)), file=sys.stderr, flush=True)
                    if output:
                        report(output, kind, found)
            print(progress(kind, found, getattr(args, kind)), file=sys.stderr, flush=True)
            if output:
                report(output, kind, found)
            print(json.dumps({kind: found}), flush=True)
            failed += len(found["failed"])
        os.chdir("/")
    sys.exit(1 if failed else 0)


def progress(kind, found, count):
    return f"{kind}: {found['count']} of {count}, {len(found['failed'])} failed, {found['seconds']} s"


if __name__ == "__main__":
    main()
