"""Running cells: the runner splits each cell into jobs, runs every job in a process of its own and stores the results.

Read `jobs`, `partial_result`, `accuracy_cells` and `cells` (which jobs a cell needs), then `runner`. `processes`,
`worker` and `ray_executor` execute a job; `progress` shows the state of a run on the terminal. `content_key` decides
whether a stored result is current, with `code_hash` and `code_modules`; `verify` updates the keys of stale results.
"""
