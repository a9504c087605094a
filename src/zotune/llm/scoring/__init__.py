"""Objectives and metrics: the values that a run minimises and reports.

Start with `objectives` (losses of candidates' scores) and `accuracy`. Objectives and metrics of generated text are in
`generation`, `answers` and `rewards`; `perplexity`, `baselines` and `intervals` complete an evaluation.
"""
