"""Updates: how an estimate changes the weights, x ← x - a η h(ĝ).

Read `transforms` (h), then `tensor_update` (the record of one tensor's update), `update` (carried out with torch
operations) and `fused` (in one pass of a kernel). `line_search` chooses a; `window` rebuilds a transform's state from
the coefficients of recent steps.
"""
