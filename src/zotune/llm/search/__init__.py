"""Searches over hyper-parameters, as generators that yield points and are sent the loss at each.

`points` has the searches; the benchmark, `zotune tune` and `--learning-rate auto` run the trials between two points.
"""
