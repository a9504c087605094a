"""Python's way in for people who hold a model, a tokenizer and rows: `train`, `evaluate`, `generate` and `load`.

Read `loaded` (a borrowed model, and the state in which it comes back), `rows` (rows in memory), `arguments` (options as
keyword arguments), then `train`. All of them run the code of the command line on what the caller has loaded.
"""
