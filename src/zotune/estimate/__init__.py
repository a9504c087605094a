"""Gradient estimates ĝ = Σ cᵢ uᵢ from forward passes alone.

Read `objective` (closures), `perturb` (the model at x + a·u, x untouched), `estimate` (the result) and
`finite_difference` (the estimators). `probes` evaluates several points, `batched_probes` in one forward pass.
`jvp` is the forward gradient, with `dual_numbers` and `jvp_rules` below it and `gradient_check` around it.
`activation_cache` and `cuda_graph` are shortcuts to the same bits.
"""
