"""The benchmark: it runs the paper's tables and figures as experiments and reports our numbers beside the paper's.

Read the packages in the order of their imports, which go one way: `spec` (experiments as data), `results` (stored
records and the statistics on them), `measure` (the computation of one job), `run` (cells, jobs and processes) and
`report` (pages, tables and figures). A package imports only from itself and from packages named before it.
"""
