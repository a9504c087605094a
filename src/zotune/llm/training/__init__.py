"""A run: training and evaluation.

Start with `train`, which calls `loop`; a step is in `step`, its optimizer in `optimizers`. `resume` and `checkpoint`
let a run continue, `signals` handles Ctrl-C, and `evaluation` is `zotune eval`. The files of a run are written by
`zotune.llm.output`.
"""
