"""Searches over the options of whole runs, which `zotune tune` makes.

`sweep` runs the trials of a search one after the other, each in a folder of its own, and picks the best.
"""
