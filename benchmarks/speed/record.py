"""Helpers of the benchmarks: run a command, and write one JSON file per benchmark with its environment."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zotune.llm.output.environment import environment

RESULTS = Path(__file__).parents[1] / "results"


def zotune(*args: str) -> dict[str, Any]:
    """Run a zotune command in a process of its own and return its JSON result."""
    command = [sys.executable, "-m", "zotune", *args, "--json"]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return result


def processor() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def provenance() -> dict[str, Any]:
    """The versions, processor, commit and time of a measurement."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "environment": {**environment(), "processor": processor()},
        "commit": commit.stdout.strip() or "unknown",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_result(name: str, measured: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write benchmarks/results/NAME.json with the measurements and their provenance."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**measured, **provenance()}, indent=2) + "\n")
    print(f"written to {path}")
