"""The options of training and evaluation, as frozen records that check themselves.

Start with `run` (the configs of `zotune train` and `zotune eval`, and recipes), which combines the options of `step`,
`data` and `selection`; these build on `method`, `tuning` and `objective`. `schema` is the base of all and groups the
options for `--help`.
"""
