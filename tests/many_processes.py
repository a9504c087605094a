"""Functions that run in several real processes, connected by gloo as torchrun connects them.

A server process imports the libraries once and forks the others, so that starting them takes no time.
"""

import multiprocessing
import os
import pickle
import queue
import socket
import traceback

_PRELOADED = ["torch", "torch.distributed", "transformers", "peft", "zotune.llm.training.train", "many_cases"]
_TIMEOUT = 240


def run(size, function, *args, env=None, raises=False):
    """The result of `function(*args)` in each of `size` processes.

    The function is one of a module, for it is found by name. With `raises`, what each of them raised, or its exit code.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    results, port = context.Queue(), free_port()
    workers = [
        context.Process(target=_work, args=(results, rank, size, port, env or {}, function, args), daemon=True)
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    found = {}
    try:
        for _ in workers:
            rank, value, error, trace = _next(results, workers, found)
            found[rank] = error if raises else value
            if error is not None and not raises:
                raise AssertionError(f"process {rank} failed:\n{trace}")
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
    return [found[rank] for rank in range(size)]


def _next(results, workers, found):
    for _ in range(_TIMEOUT):
        try:
            return results.get(timeout=1)
        except queue.Empty:
            for rank, worker in enumerate(workers):
                if rank not in found and worker.exitcode not in (None, 0):
                    return rank, None, worker.exitcode, f"it exited with {worker.exitcode}"
    raise AssertionError(f"no result in {_TIMEOUT} s; there are those of {sorted(found)}")


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _work(results, rank, size, port, env, function, args):
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}
    try:
        results.put((rank, function(*args), None, ""))
    except BaseException as error:
        results.put((rank, None, _portable(error), traceback.format_exc()))
    results.close()
    results.join_thread()


def _portable(error):
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
