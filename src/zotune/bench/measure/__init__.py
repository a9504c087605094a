"""The computations that a worker process does: each function takes a job's options and returns a run as JSON.

Read `accuracy` (training and evaluation), `estimates` (an estimate against the true gradient), `step` and
`memory_formulas` (memory and time of one step). `search` proposes the learning rates and μ that a cell tries.
"""
