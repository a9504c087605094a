"""The user's own rows: the shapes of a row, and the meaning of a row of each shape.

Start with `records` (the meanings that a row may have) and one shape such as `completion`, a pure function from a row
to a record. `shapes` lists them all, `infer` finds the shape of a file from its columns, `sources` reads and checks
whole files, and `rendering` turns a record into an example for one tokenizer. Only `rendering` of chats imports
transformers, and nothing imports torch, so that a broken row is refused before a model is loaded.
"""
