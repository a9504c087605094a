"""Measuring, and the paper's tables and figures measured again."""
