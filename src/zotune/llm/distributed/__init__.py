"""A run of several processes, which torchrun starts: who computes what, who writes, and whether all agree.

Read `mesh` (how the processes share a step), then `agreement` (what they compare). The first process writes and speaks;
the others compute the same run into memory.
"""
