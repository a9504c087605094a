"""Several processes with a part of the rows each take the steps of one process with all of them, to the bit."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import accelerate
import pytest
import torch
from packaging.version import Version
from torch.autograd import forward_ad

from zotune.integrations.accelerate import averaged, copy_from_first

ROWS, STEPS = 8, 3


def tuned(world, out, rank=0, **options):
    """The weights and logged losses of a short run of one process; the first has other weights than its fellows."""
    import transformers as hf

    from zotune.integrations.transformers import ZOTrainer, ZOTrainingArguments

    torch.manual_seed(rank)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, attention_dropout=0.3, **sizes))
    tokens = torch.randint(64, (ROWS, 6), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": x, "labels": torch.where(torch.arange(6) < i % 5, -100, x)} for i, x in enumerate(tokens)]
    args = ZOTrainingArguments(
        str(out), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2, max_steps=STEPS, logging_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2 // world, save_strategy="no",
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    trainer = ZOTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    if Version(accelerate.__version__) >= Version("1.15"):
        assert trainer.model_wrapped is model  # nothing holds room for gradients
    return [p.detach().clone() for p in model.parameters()], [
        x["loss"] for x in trainer.state.log_history if "loss" in x
    ]


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank, port):
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
    }


def one_of_two(rank, port, out, options):
    """What a process forked from this one does: its imports are made."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    torch.save(tuned(2, out, rank, **options), out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"method": "forward_grad"}], ids=["differences", "forward_grad"])
def test_two_processes_take_the_steps_of_one(tmp_path, options):
    alone = tuned(1, tmp_path, **options)
    port, fork = free_port(), multiprocessing.get_context("fork")
    both = [fork.Process(target=one_of_two, args=(rank, port, tmp_path, options)) for rank in range(2)]
    try:
        for process in both:
            process.start()
        for process in both:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in both:
            process.kill()
    for rank in range(2):
        weights, losses = torch.load(tmp_path / f"{rank}.pt")
        assert losses == alone[1]
        assert all(map(torch.equal, weights, alone[0]))


@pytest.mark.slow
def test_accelerate_launches_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, pathlib\nfrom integrations.test_accelerate import tuned\n"
        "import os; rank = int(os.environ['RANK']); out = pathlib.Path(sys.argv[1])\n"
        "torch.save(tuned(2, out, rank), out / f'{rank}.pt'); torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    path = os.pathsep.join([*sys.path, os.path.dirname(os.path.dirname(__file__))])
    done = subprocess.run(
        [*map(str, command), str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0
    alone = tuned(1, tmp_path)
    for rank in range(2):
        weights, losses = torch.load(tmp_path / f"{rank}.pt")
        assert losses == alone[1]
        assert all(map(torch.equal, weights, alone[0]))


def test_the_mean_and_its_slope_are_those_of_all_values_in_the_loaders_order():
    values = torch.tensor([[1e16, 1.0], [-1e16, 1.0]], dtype=torch.float64)  # of two processes; order matters
    accelerator = SimpleNamespace(num_processes=2, gather=lambda local: torch.cat([local, others.pop()]))
    others = [values[1]]
    assert averaged(accelerator, values[0]).item() == 1.0
    others = [torch.tensor([3.0, 4.0]).double(), torch.zeros(2).double()]
    with forward_ad.dual_level():
        mean = averaged(accelerator, forward_ad.make_dual(torch.zeros(2).double(), torch.tensor([1.0, 2.0]).double()))
        assert forward_ad.unpack_dual(mean).tangent.item() == 5.0


def test_parameters_and_buffers_become_those_of_the_first_process(monkeypatch):
    model = torch.nn.BatchNorm1d(3)
    model.wide = torch.nn.Parameter(torch.zeros(4, 2).T)  # not contiguous, as broadcast wants it
    sent = []

    def broadcast(tensor, src):
        assert tensor.is_contiguous()
        sent.append(src)
        tensor.fill_(7)

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    copy_from_first(SimpleNamespace(num_processes=1), model)
    assert sent == []
    copy_from_first(SimpleNamespace(num_processes=2), model)
    assert sent == [0] * 6
    assert all((t == 7).all() for t in (*model.parameters(), *model.buffers()))
