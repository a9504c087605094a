"""A function run by several real processes that exchange tensors over gloo, as `torchrun` would start them."""

import traceback
from multiprocessing import get_context
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def run(function, world, *args, timeout=300):
    """What `function(mesh, *args)` returns in each of `world` processes, by rank; the first error of one is raised."""
    context = get_context("spawn")
    with TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        started = [context.Process(target=_one, args=(queue, function, r, world, folder, args)) for r in range(world)]
        for process in started:
            process.start()
        try:
            found = dict(_next(queue, started, timeout) for _ in started)
        finally:
            for process in started:
                process.join(5)
                process.kill()
    errors = [result for kind, result in found.values() if kind == "error"]
    if errors:
        raise AssertionError(errors[0])
    return [found[rank][1] for rank in range(world)]


def _next(queue, processes, timeout):
    for _ in range(10 * timeout):
        if not queue.empty():
            return queue.get()
        if not any(p.is_alive() for p in processes):
            break
        processes[0].join(0.1)
    raise AssertionError("a process ended without a result, or took too long")


def _one(queue, function, rank, world, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        queue.put((rank, ("result", function(init_device_mesh("cpu", (world,)), *args))))
    except BaseException:
        queue.put((rank, ("error", f"process {rank} of {world}:\n{traceback.format_exc()}")))
    finally:
        dist.destroy_process_group()
