"""Experiments as data: one TOML file for each table or figure of the paper, its schema, and its cells.

Read `vocabulary` (words that specifications and results share), `claims`, `schema` (the parts of a TOML file) and
`resolve` (from a file to cells with all their options), then a file of `experiments/`. `measured_step` holds the
options of cells that measure one training step.
"""
