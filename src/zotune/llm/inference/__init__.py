"""Answers of a model to prompts that a person types or keeps in a file: `zotune generate`, `zotune chat`, and Python.

Read `prompts` (a text, a chat or a row to the prompt that the model was tuned to read), `answers` (the answers to many
prompts, in batches) and `conversation` (a chat whose answers appear while they are generated).
"""
