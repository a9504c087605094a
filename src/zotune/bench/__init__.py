"""The benchmark: the paper's tables and figures as experiments in TOML, a runner for them, and what they found."""
