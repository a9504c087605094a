"""A function run by several real processes that exchange tensors over gloo, as `torchrun` would start them."""

import time
import traceback
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def run(function, world, *args, timeout=300):
    """What `function(mesh, *args)` returns in each of `world` processes, by rank; the first error of one is raised."""
    context = get_context("spawn")
    with TemporaryDirectory() as folder:
        started = [context.Process(target=_one, args=(function, r, world, folder, args)) for r in range(world)]
        for process in started:
            process.start()
        end = time.monotonic() + timeout
        # A process that fails leaves the others waiting for it.
        while any(p.is_alive() for p in started) and not _errors(folder) and time.monotonic() < end:
            time.sleep(0.02)
        for process in started:
            process.join(0 if _errors(folder) else 1)
            process.kill()
        if errors := _errors(folder):
            raise AssertionError(errors[0].read_text())
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(world)]


def _errors(folder):
    return sorted(Path(folder).glob("error-*"))


def _one(function, rank, world, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(init_device_mesh("cpu", (world,)), *args), Path(folder, str(rank)))
        dist.barrier()
    except BaseException:
        Path(folder, f".{rank}").write_text(f"process {rank} of {world}:\n{traceback.format_exc()}")
        Path(folder, f".{rank}").rename(Path(folder, f"error-{rank}"))
    dist.destroy_process_group()
