"""zotune inside other tools' training loops. Read `transformers` first, then `trl`, which is two lines a trainer.

Nothing of this package is imported by the rest of zotune, and each module needs the library that it is named after.
"""
