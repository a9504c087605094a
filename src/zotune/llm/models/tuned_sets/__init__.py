"""Tuned sets that are small, or aimed at what a model reads: they learn with fewer forward passes.

Read `adapters` (LoRA with a frozen side, VeRA, IA3), then `aim`, what forward passes find for a set, and `find`.
"""
