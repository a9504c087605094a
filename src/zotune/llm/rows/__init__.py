"""The user's own rows: the shapes of a row, and what a row of each shape means.

Start with `records` (what a row may mean) and one shape such as `completion`, a pure function from a row to a record.
`shapes` lists them all, `infer` finds the shape of a file from its columns, `sources` reads and checks whole files, and
`rendering` turns a record into an example for one tokenizer. Nothing here needs torch or transformers but `rendering`
of a chat, so that a broken row is refused before a model is loaded.
"""
