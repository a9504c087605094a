"""What a command writes into its output folder, and how: `output_folder` is the folder of a run.

`staging` holds new files until they are complete. `result`, `model_files`, `metrics_log`, `model_card`, `json_files`
and `environment` are what is written.
"""
