"""Stored results and the statistics computed from them; nothing here runs a model.

Read `records` (the JSON schema of a cell's result), `intervals` (confidence intervals), `quantities` (the numbers that
can be read from a run), `tables` and `verdicts` (whether the results support the paper's claims).
"""
