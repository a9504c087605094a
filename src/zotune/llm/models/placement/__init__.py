"""Models whose weights do not all lie on one device, or in one process: which module or slice lies where.

`sharded` cuts a model over the processes that torchrun started.
"""
