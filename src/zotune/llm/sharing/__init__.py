"""What becomes of a run's folder: one whole model, a GGUF file, or a repository of the Hugging Face Hub.

Read `whole_model` (an adapter merged into its base), `gguf` (llama.cpp's converter, run apart), `local_paths` and
`shared_folder` (a copy of a folder that names no place on this machine), and `hub` (the upload of that copy).
"""
