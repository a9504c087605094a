"""Reports on results: an HTML page, a Markdown page, tables as Markdown, CSV and LaTeX, and figures as PDF and SVG.

Read `sections` (the content of a report) and `report` (which files are written), then the writers: `html` with
`templates/`, `markdown`, `formats` (tables) and `phrases` (sentences). Figures are data (`figures`), chosen for each
experiment by `choose_figures` and drawn by `svg` and `print_figures`. `run_html` is the page of a single run.
"""
