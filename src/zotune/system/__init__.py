"""What the process takes from its machine: memory, files and caches on disk, the C library's allocator.

`limits` lists every size that trades memory for time, `peak_memory` measures, `malloc` tunes the allocator so that
scratch memory is reused from step to step, `cache_dir` names the user's cache folder, `atomic_write` replaces files,
`lazy_names` imports a package's public
names at their first use.
"""
