"""Random directions, kept as seeds and computed where they are needed.

Read `samplers` (distributions) and `direction` (one seed, any slice of it), then the directions of restricted shape:
`low_rank`, `sparse` and `blocks`. `schedule` renews masks and factors as a run goes on.
"""
