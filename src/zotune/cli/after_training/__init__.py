"""The commands for a model that is there: let it write or chat, make one folder or file of it, and share it.

Read `generate` and `chat` (what the model says), then `merge`, `export` and `push` (what becomes of a run's folder);
`arguments` reads the arguments that the last three share.
"""
