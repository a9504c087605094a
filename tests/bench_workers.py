"""A worker of the benchmark whose jobs take as long as they are left alone, and import no libraries."""

import sys

_CODE = """
import sys, time
from pathlib import Path
from zotune.bench.run import worker

def sleep(line, stamp=None):
    (Path(line["folder"]) / "began").touch()
    time.sleep(600)

worker._prepare, worker.do = (lambda: None), sleep
sys.exit(worker.main(*sys.argv[1:]))
"""
SLEEPER = (sys.executable, "-c", _CODE)
