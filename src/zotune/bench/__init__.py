"""The benchmark: the paper's tables and figures as experiments, a runner for them, and what they found."""
