"""What `many_processes` runs: steps of each method over tiny models, and runs of `zotune train`."""

import hashlib
import os
import re
import signal
import time
from functools import partial

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

import zotune as zo
from zotune.errors import RunError
from zotune.system.processes import joined

# By name: a method over the model, and options of it.
STEPS = {
    **{name: partial(method, num_queries=2) for name, method in zo.METHODS.items() if name != "grzo"},
    "one-sided": partial(zo.zo_sgd, difference=zo.forward_difference, num_queries=3),
    "gaussian": partial(zo.zo_sgd, sampler=zo.gaussian, num_queries=3),
    "sparse": partial(zo.zo_adam, sampler=zo.sparse(zo.gaussian, sparsity=0.5), num_queries=2),
    "low rank": partial(zo.zo_sgd_mmt, sampler=zo.low_rank(zo.gaussian, 2), num_queries=2),
    "window": partial(zo.zo_adam, window=3, num_queries=2),
    "conservative, one-sided": partial(zo.zo_sgd_cons, difference=zo.forward_difference, num_queries=2),
}
# Methods with a direction for each group of examples, which need the losses of these.
OF_EXAMPLES = {
    "flipped": partial(zo.zo_adam, sampler=zo.flipped(zo.gaussian), directions_per_batch="auto", num_queries=2),
    "grzo": partial(zo.grzo, num_queries=2),
    "one-sided of examples": partial(
        zo.zo_sgd, sampler=zo.low_rank(zo.rademacher), difference=zo.forward_difference, directions_per_batch=5
    ),
}


class Net(nn.Module):
    """A small network, odd in all sizes, with a norm and an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.body = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 3))

    def forward(self, x):
        return self.body(self.embed(x).mean(1))


def digest(tensors):
    """The bits of some tensors, as text."""
    found = hashlib.blake2b(digest_size=8)
    for t in tensors:
        found.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def micro_batches(model, number, kind):
    """Closures of micro-batches of unequal sizes that know their batch, are plain, or have no gradient."""
    torch.manual_seed(1)
    batches = [(torch.randint(11, (2 + i % 2, 5)), torch.randint(3, (2 + i % 2,))) for i in range(number)]

    def losses(x, y):
        return nn.functional.cross_entropy(model(x).float(), y, reduction="none").double()

    if kind == "batched":
        return [zo.batched(losses, x, y, most=4) for x, y in batches], [len(y) for _, y in batches]
    if kind == "examples":
        return [zo.per_example(losses, x, y) for x, y in batches], [len(y) for _, y in batches]
    if kind == "partly separable":  # the second one needs a number of one end of a probe alone

        def needs_a_number(x, y):
            return losses(x, y) * (1 if model(x).sum().item() < 1e9 else 2)

        functions = [needs_a_number if i == 1 else losses for i in range(number)]
        return [zo.batched(f, x, y) for f, (x, y) in zip(functions, batches, strict=True)], None
    if kind == "accuracy":
        return [lambda x=x, y=y: 1 - (model(x).argmax(1) == y).double().mean() for x, y in batches], None
    return [lambda x=x, y=y: losses(x, y).mean() for x, y in batches], [len(y) for _, y in batches]


def steps_of(name, query, data, dtype=torch.float32, kind="batched", parts=4, steps=3):
    """Digest of weights and state, the losses and the records of some steps, on a mesh."""
    model = network(dtype)
    mesh = zo.mesh(query=query, data=data) if query * data > 1 else zo.Mesh()
    blocks = {"blocks": zo.blocks_by_linear(model), "reuse_prefix": False}
    hybrid = name == "hybrid"
    if hybrid:
        upper = torch.optim.SGD(model.body.parameters(), lr=0.05, momentum=0.9)
        opt = zo.Hybrid(zo.zo_sgd(model.embed, lr=0.05), upper)
    elif name in ("blocks", "sequential blocks"):
        order = "joint" if name == "blocks" else "sequential"
        opt = zo.zo_sgd(model, lr=0.05, num_queries=2, block_order=order, **blocks)
    else:
        opt = (STEPS | OF_EXAMPLES)[name](model, lr=0.05)
    records = []
    if not hybrid:
        opt.on_step = lambda record: records.append(record)
    closures, weights = micro_batches(model, parts, kind)
    losses = [opt.step(zo.accumulate(closures, weights, mesh=mesh)) for _ in range(steps)]
    # A state is made when it is needed first, in another order in each process.
    states = [] if hybrid else [opt.state[p] for p in model.parameters() if p in opt.state]
    state = [t for s in states for _, t in sorted(s.items()) if torch.is_tensor(t)]
    return digest([*model.parameters(), *state]), losses, records


def many_steps(cases):
    """`steps_of` of some cases, in one group of processes."""
    with joined(120):
        return [steps_of(*case) for case in cases]


def train_runs(configs):
    """Run `zotune train` by each config, in one group of processes; what each wrote is for `written_by` to read."""
    from zotune.llm.config.run import TrainConfig
    from zotune.llm.training.train import train

    return [train(TrainConfig(**config)).num_steps for config in configs]


def written_by(folder):
    """What a run wrote, without times and memory: digests of binary files, and the content of the others."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "checkpoint.safetensors":  # it knows how long the run took
            found[name] = digest(t for _, t in sorted(load_file(path).items()))
        elif path.suffix in (".safetensors", ".zol"):
            found[name] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        elif path.suffix in (".jsonl", ".json", ".yaml", ".md") and path.name != "zotune-files.json":
            text = path.read_text(encoding="utf-8").replace(str(folder), "FOLDER")
            found[name] = re.sub(r'"(seconds|peak_memory|eval_runtime)": [-+.e\d]+', "", text)
            lines = found[name].splitlines()
            found[name] = "\n".join(x for x in lines if not x.startswith(("| training time", "| peak memory")))
    return found


def disturbed_run(config, rank, act, step=2):
    """Run `zotune train`, and let one process do something at a step: end, raise, sleep, get a signal, lose a bit."""
    from zotune.llm.config.run import TrainConfig
    from zotune.llm.training import loop
    from zotune.llm.training.train import train

    run_step = loop.Run._run_step

    def disturbed(self, *args):
        if int(os.environ["RANK"]) == rank and self.counters.step == step:
            _ACTS[act](self)
        run_step(self, *args)

    loop.Run._run_step = disturbed
    result = train(TrainConfig(**config))
    return result.num_steps, result.stopped_by


def run_on_a_full_disk(config):
    """Run `zotune train` where the model cannot be written."""
    from zotune.llm.config.run import TrainConfig
    from zotune.llm.output import output_folder
    from zotune.llm.training.train import train

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    output_folder.write_model_files = full
    return train(TrainConfig(**config)).num_steps


def _lose_a_bit(run):
    p = next(p for p in run.lm.module.parameters() if p.requires_grad)
    with torch.no_grad():
        p.view(-1)[0] += 1


def _fail(run):
    raise RunError("the disk of this machine is full.")


_ACTS = {
    "end": lambda run: os._exit(9),
    "raise": _fail,
    "sleep": lambda run: time.sleep(20),
    "SIGTERM": lambda run: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": lambda run: os.kill(os.getpid(), signal.SIGINT),
    "lose a bit": _lose_a_bit,
}


def run_with_own(config, rank, change):
    """Run `zotune train`, and let one process begin with something of its own."""
    from zotune.llm.config.run import TrainConfig
    from zotune.llm.training.train import train

    os.chdir(change["folder"])
    if int(os.environ["RANK"]) == rank:
        if "threads" in change:
            # Told, not set: threads of a process that was forked beside others may wait for ever.
            torch.get_num_threads = lambda: change["threads"]
        os.chdir(change.get("cwd", "."))
        config = config | change.get("options", {})
    return train(TrainConfig(**config)).num_steps


def meet_at(port, timeout):
    """Join the other processes at a port, as the first one, which is to listen there."""
    if os.environ["RANK"] != "0":
        return 0
    os.environ["MASTER_PORT"] = str(port)
    with joined(timeout) as processes:
        return processes.size


def evaluated(configs):
    """The results of `zotune eval` by each config, without times, in the processes that there are."""
    from zotune.llm.config.run import EvalConfig
    from zotune.llm.training.evaluation import evaluate

    found = [evaluate(EvalConfig(**config)) for config in configs]
    return [[{**vars(task.evaluation), "seconds": 0} for task in results.values()] for results, _ in found]


def tuned_in_python(rows):
    """Tune a loaded model on rows in memory; a digest of what was tuned, its log and an evaluation, without times."""
    from zotune.llm import evaluate, load, train

    model, tokenizer = load("random:opt-tiny", device="cpu")
    calls = Calls()
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_queries": 2}
    result = train(model, tokenizer, rows, rows, learning_rate=1e-2, eval_steps=1, callbacks=[calls], **options)
    tuned = [p for p in result.model.parameters() if p.requires_grad]
    found = evaluate(result.model, tokenizer, rows)
    return digest(tuned), result.num_steps, result.num_forwards, found.scores, found.num_forwards, calls.number > 0


def tuned_in_shards(rows, way):
    """As `tuned_in_python`, of all weights of a model that its owner has cut, if several processes run."""
    from zotune.llm import evaluate, load, train
    from zotune.llm.models.placement import sharded
    from zotune.model.shards import gathered

    with joined(120) as processes:
        model, tokenizer = load("random:opt-tiny", device="cpu")
        if processes.size > 1:
            if way == "fsdp":  # by default the weights outside of the layers stay gathered after a pass
                for part in (*model.model.decoder.layers, model):
                    fully_shard(part, mesh=init_device_mesh("cpu", (processes.size,)))
            else:
                sharded.cut_by_plan(model)
        options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "tuning": "full"}
        options |= {"eval_steps": 1, "load_best_model_at_end": True, "num_dev": 3}
        result = train(model, tokenizer, rows, rows[:5], learning_rate=3e-2, **options)
        found = evaluate(model, tokenizer, rows)
        weights = gathered(dict(result.model.named_parameters()))
        return digest(weights.values()), result.num_forwards, found.loss, found.predictions


class Calls(TrainerCallback):
    """Counts the steps, and ends training after the second by what one process alone would decide."""

    number = 0

    def on_step_end(self, args, state, control, **more):
        self.number += 1
        control.should_training_stop = self.number == 2
        return control
