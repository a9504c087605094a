"""The forward gradient: exact slopes along directions, by forward-mode differentiation at the memory of inference.

Read `jvp`, then `dual_numbers` (weights that have a tangent while they are read) and `jvp_rules` (operations for which
torch has no rule). `gradient_check` compares the first estimate with differences before it is trusted.
"""
