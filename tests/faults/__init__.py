"""Faults on purpose: killed processes, commands at once on one folder, full disks, damaged and crafted files.

    PYTHONPATH=tests python -m faults --output benchmarks/results/faults.json
    PYTHONPATH=tests python -m faults --only kills --kills 20

One process imports everything and forks a child for each trial; the child runs the command line. Read `process` (a
child and its end), `tracing` (stopping a child before a chosen write), `commands` (what is run, and what it leaves),
then the kinds: `kills`, `pairs`, `disks`, `accidents`, `fuzz` with its inputs in `fuzz_files` and `mutations`.
"""
