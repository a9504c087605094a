"""Language models: loading them, choosing their tuned parameters, and running forward passes.

Start with `language_model` and `load`; then `tuned_parameters` and the package `adapters` for the tuned parameters.
`candidate_scores` scores candidates (verbalizers, completions), `partial_forward` makes a forward pass cheap, the
package `placement` loads models that do not lie on one device; the caches (`activation_cache`, `prompt_cache`,
`activation_storage`) skip layers below the tuned ones.
"""
