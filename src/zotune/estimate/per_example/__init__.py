"""One direction an example: ĝ = Σ c_g u_g, where c_g is the slope along u_g of the losses of a group of examples.

Read `objective` (a loss an example), `weights` (each example alone meets its own perturbed weights), `difference` (the
estimator) and `agreement` (how many directions pay).
"""
