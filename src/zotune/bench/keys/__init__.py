"""Whether a stored result is current: one hash of its config, the code that computes it, its data and its libraries.

Read `content_key` (the parts of a key), `code_hash` (the hash of the code that functions run), `code_reader` (from a
definition to what counts of it) and `code_modules` (which definition a name refers to).
"""
