"""`zotune bench verify`: one job of each kind of stale results is run again, and the kind is accepted if it agrees.

Read `groups` (which results are of one kind), `comparison` (which numbers must agree) and `verify`, which runs the jobs
and gives accepted results today's keys.
"""
