"""Functions that run in several real processes, connected by gloo as torchrun connects them.

A server forks them. It is itself forked from the process of the tests, before the first test: it has all imports, and
nothing of what tests do.
"""

import multiprocessing
import os
import pickle
import queue
import socket
import traceback
import warnings
from functools import cache

_TIMEOUT = 240


def run(size, function, *args, env=None, raises=False):
    """The result of `function(*args)` in each of `size` processes.

    The function is one of a module, for it is found by name. With `raises`, what each of them raised, or its exit code.
    """
    connection = server()
    connection.send_bytes(pickle.dumps((size, os.getcwd(), env or {}, function, args)))
    assert connection.poll(_TIMEOUT + 60), "the server of the processes does not answer"
    found = pickle.loads(connection.recv_bytes())
    for rank, (_, error, trace) in enumerate(found):
        if error is not None and not raises:
            raise AssertionError(f"process {rank} failed:\n{trace}")
    return [error if raises else pickle.loads(value) for value, error, _ in found]


@cache
def server():
    """The connection to the server, which ends with this process."""
    here, there = multiprocessing.Pipe()
    if os.fork():
        there.close()
        return here
    here.close()
    warnings.resetwarnings()  # those of pytest make each an error
    with open(os.devnull, "w") as nowhere:  # what matters of their output is in errors
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        while True:
            there.send_bytes(pickle.dumps(_forked(*pickle.loads(there.recv_bytes()))))
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _forked(size, folder, env, function, args):
    """By rank, the pickled result of a function in each of some processes, its error, and that as text."""
    os.chdir(folder)
    context = multiprocessing.get_context("fork")
    results, port = context.Queue(), free_port()
    workers = [
        context.Process(target=_work, args=(results, rank, size, port, env, function, args), daemon=True)
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    found = {}
    try:
        for _ in workers:
            rank, *answer = _next(results, workers, found)
            found[rank] = answer
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
                    return rank, b"", worker.exitcode, f"it exited with {worker.exitcode}"
    missing = next(rank for rank in range(len(workers)) if rank not in found)
    error = TimeoutError(f"no result in {_TIMEOUT} s; there are those of {sorted(found)}")
    return missing, b"", error, str(error)


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
        results.put((rank, pickle.dumps(function(*args)), None, ""))
    except BaseException as error:
        results.put((rank, b"", _portable(error), traceback.format_exc()))
    results.close()
    results.join_thread()


def _portable(error):
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
