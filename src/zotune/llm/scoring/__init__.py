"""Objectives and metrics: the values that a run minimises and reports.

Start with `objectives` (losses of candidates' scores) and `accuracy`. Objectives and metrics of generated text are in
`generation`, `generated_answers` and `rewards`; `perplexity`, `baselines` and `intervals` complete an evaluation. The
scores of candidates themselves are computed by `zotune.llm.models.candidate_scores`.
"""
