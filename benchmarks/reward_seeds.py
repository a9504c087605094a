"""Check the claim of the reward example for three seeds: the gain on held-out prompts with its paired interval.

    make bench-reward

Each seed runs in a process of its own. Seconds depend on other load of the machine; CPU seconds depend on it less.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from record import write_result

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "examples/reward.py", "--json", "--seed", str(seed), "--output-dir", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print({key: value for key, value in runs[-1].items() if not key.startswith("answers")}, flush=True)
        write_result("reward", {"recipe": (ROOT / "examples/one_word.yaml").read_text(), "runs": runs})


if __name__ == "__main__":
    main()
