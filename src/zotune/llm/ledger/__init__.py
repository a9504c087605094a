"""Ledgers of language-model runs: rebuilding, merging and verifying fine-tuned models without data.

Start with `rebuild`; `streaming` does the same one tensor at a time, `merge` combines several runs, and `verify`
compares
saved weights with the ledger.
"""
