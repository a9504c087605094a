"""Gradient estimates ĝ = Σ cᵢ uᵢ from forward passes alone.

Read `objective` (closures), `perturb` (the model at x + a·u, x untouched), `estimate` (the result) and
`finite_difference` (the estimators). `probes` evaluates several points, `batched_probes` in one forward pass.
`forward_mode` holds the forward gradient.
`activation_cache` and `cuda_graph` are shortcuts to the same bits.
"""
