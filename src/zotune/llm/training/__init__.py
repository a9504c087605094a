"""A run: training, evaluation, and the output folder.

Start with `train`, which calls `loop`; a step is in `step`, its optimizer in `optimizers`. `resume` and `checkpoint`
let
a run continue, `output_folder` writes its files, `signals` handles Ctrl-C, and `evaluation` is `zotune eval`.
"""
