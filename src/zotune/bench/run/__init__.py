"""Running cells: the runner splits each cell into jobs, runs every job in a process of its own and stores the results.

Read `jobs`, `partial_result`, `accuracy_cells` and `cells` (which jobs a cell needs), then `runner`. `slots` says how
many jobs run at a time and where; `processes`, `worker` and `ray_executor` execute a job; `progress` shows the state of
a run on the terminal. `estimate` tells before a run how long it will take.
"""
