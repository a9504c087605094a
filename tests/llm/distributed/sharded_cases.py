"""What each process of a test of shards does: it takes steps with a sharded model and compares it with a plain one."""

import pickle
from functools import partial

import sharded_models as models
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import many_processes
import zotune as zo
from zotune.apply.line_search import conservative
from zotune.apply.transforms import adam
from zotune.directions.samplers import Subspace
from zotune.directions.subspace import subspace
from zotune.ledger.replay import describe_tensors
from zotune.model.shards import gathered, whole
from zotune.system.processes import joined


def run(function, size, *args):
    """What `function(mesh, *args)` returns in each of `size` processes, by rank."""
    return [pickle.loads(found) for found in many_processes.run(size, _on_mesh, function, pickle.dumps(args))]


def _on_mesh(function, args):
    with joined(60) as processes:
        return pickle.dumps(function(init_device_mesh("cpu", (processes.size,)), *pickle.loads(args)))


HALF, WIDEST = torch.bfloat16, 16
ADAM = partial(adam, beta1=0.9, beta2=0.99, eps=1e-8)


def _scales(m):
    """Scales of what some matrices multiply."""
    return {name: torch.linspace(0.5, 1.5, m.get_parameter(name).shape[1]) for name in MATRICES}


def _bases(m):
    """Bases for some matrices, of one side and of both."""
    (name, other), random = MATRICES, torch.Generator().manual_seed(0)
    rows, columns = m.get_parameter(other).shape
    left, right = (torch.randn(n, 2, generator=random) for n in (rows, columns))
    only = torch.randn(m.get_parameter(name).shape[1], 2, generator=random)
    return {name: Subspace(0, None, only), other: Subspace(0, left, right)}


MATRICES = ("layers.0.up.weight", "layers.1.down.weight")
# By name: how the optimizer is made, and the dtype.
OPTIMIZERS = {
    "zo_sgd": (partial(zo.zo_sgd, lr=0.01, num_queries=2), torch.float32),
    "zo_sgd_sign": (partial(zo.zo_sgd_sign, lr=0.01), torch.float32),
    "zo_sgd_mmt": (partial(zo.zo_sgd_mmt, lr=0.01, sampler=zo.gaussian), torch.float32),
    "zo_sgd_cons": (partial(zo.zo_sgd_cons, lr=0.01), torch.float32),
    "zo_adam": (partial(zo.zo_adam, lr=0.01, weight_decay=0.1), torch.float32),
    "forward_grad": (partial(zo.forward_grad, lr=0.01), torch.float32),
    "sparse": (partial(zo.zo_sgd, lr=0.01, sampler=zo.sparse(zo.gaussian, 0.5)), torch.float32),
    "low rank": (partial(zo.zo_sgd, lr=0.01, sampler=zo.low_rank(zo.gaussian, 2)), torch.float32),
    "low rank, bfloat16": (partial(zo.zo_adam, lr=0.01, sampler=zo.low_rank(zo.rademacher, 2)), HALF),
    "blocks": (lambda m: zo.zo_sgd(m, 0.01, blocks=zo.blocks_by_layer(m)), torch.float32),
    "blocks in turn": (
        lambda m: zo.zo_adam(m, 0.01, blocks=zo.blocks_by_part(m), block_order="sequential"),
        torch.float32,
    ),
    "window": (partial(zo.zo_adam, lr=0.01, window=2), torch.float32),
    "state and line search": (
        partial(zo.ZerothOrder, lr=0.01, transform=ADAM, step=conservative, weight_decay=0.1),
        torch.float32,
    ),
    "bfloat16": (partial(zo.zo_sgd, lr=0.01, sampler=zo.gaussian), HALF),
    "zo_adam, bfloat16": (partial(zo.zo_adam, lr=0.01), HALF),
    "zo_sgd_cons, bfloat16": (partial(zo.zo_sgd_cons, lr=0.05), HALF),
    "master": (partial(zo.zo_sgd_mmt, lr=0.01, rounding="master"), HALF),
    "float64": (partial(zo.zo_adam, lr=0.01), torch.float64),
    "subspace": (partial(zo.zo_adam, lr=0.01, sampler=subspace(zo.gaussian, 2, interval=2)), torch.float32),
    "subspace of two sides": (
        partial(zo.zo_sgd, lr=0.01, sampler=subspace(zo.gaussian, 3, interval=2, sides="both")),
        torch.float32,
    ),
    "flipped": (partial(zo.zo_sgd, lr=0.01, num_queries=3, sampler=zo.flipped(zo.gaussian)), torch.float32),
    "scaled by inputs": (lambda m: zo.zo_sgd(m, 0.01, sampler=zo.input_scaled(zo.gaussian, _scales(m))), HALF),
    "within given subspaces": (lambda m: zo.zo_sgd(m, 0.01, sampler=zo.within(zo.gaussian, _bases(m))), torch.float32),
    # Its coordinates have the shape of a matrix with few rows.
    "coordinates of the matrix's shape": (partial(zo.mopi, lr=0.01, rank=WIDEST), torch.float32),
    "master of coordinates": (partial(zo.zo_muon, lr=0.01, rank=2, rounding="master"), HALF),
}
OPTIMIZERS |= {
    name: (partial(make, lr=0.01), torch.float32)
    for name, make in zo.METHODS.items()
    if name not in OPTIMIZERS and name != "hizoo"
}
# Those of them that are made for the names of `models.Model`.
OF_NAMES = ("scaled by inputs", "within given subspaces")
# Those with a direction for each example.
OF_EXAMPLES = ("grzo",)


def steps(mesh, way, names, sizes):
    """Steps of each optimizer on shards: the largest difference of losses from the plain model's, by name.

    The plain model takes the same coefficients; weights and states are compared bit by bit after every step.
    """
    shard = getattr(models, way)
    return {name: _steps(mesh, shard, *OPTIMIZERS[name], sizes, alone=name in OF_EXAMPLES) for name in names}


def steps_by_plan(mesh, family, names):
    """As `steps`, of a model of transformers that is cut by its plan."""
    make = partial(models.family, family)
    return {name: _steps(mesh, models.by_plan, *OPTIMIZERS[name], {}, alone=False, build=make) for name in names}


def _steps(mesh, shard, make, dtype, sizes, alone, build=models.model):
    plain, model = build(dtype, **sizes), shard(build(dtype, **sizes), mesh)
    tokens = models.batch(vocabulary=sizes.get("vocabulary", models.VOCABULARY))
    objective = models.objective_of_examples if alone else models.objective
    optimizer, reference, records = make(model), make(plain), []
    optimizer.on_step = records.append
    worst, in_turn = 0.0, optimizer.block_order == "sequential"  # blocks in turn meet weights that have moved
    for _ in range(3):
        expected = reference.estimate(objective(plain, tokens)).loss
        found = optimizer.step(objective(model, tokens))
        worst = worst if in_turn else max(worst, abs(found - expected))
        reference.replay_step(records[-1])
        compare(model, plain, optimizer, reference)
    with torch.no_grad():  # what is gathered now is what the step has written
        found, expected = models.logits(model, tokens), models.logits(plain, tokens)
        most = (0.02 if dtype == HALF else 1e-5) * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, atol=most, rtol=0)
    return worst


def compare(model, plain, optimizer, reference):
    """Weights and states of a sharded and a plain model have the same bits."""
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(whole(p), q), f"{name}: weights"
    for t, other in zip(optimizer.tuned, reference.tuned, strict=True):
        ours, theirs = optimizer.state[t.parameter], reference.state[other.parameter]
        assert ours.keys() == theirs.keys(), t.name
        for key in ours:
            same = (
                torch.equal(whole(ours[key]), theirs[key]) if torch.is_tensor(ours[key]) else ours[key] == theirs[key]
            )
            assert same, f"{t.name}: {key}"


def side_by_side(mesh, shard):
    """The loss with probes in one pass, that with probes one by one, and how many passes the model ran for each."""
    found = []
    for most in (2, 1):
        model, passes = getattr(models, shard)(models.model(), mesh), []
        model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        tokens = models.batch()
        closure = zo.batched(lambda t, m=model: models.losses(m, t), tokens, most=most)
        found.append((zo.zo_adam(model, lr=0.01).step(closure), len(passes)))
    return found


RESUMED = ("master", "coordinates of the matrix's shape")


def saved_states(mesh, way, name):
    """A run in shards saved half-way, as whole tensors, with what the run has after the second half.

    One that goes on from them in as many processes has the same then.
    """
    make, dtype = OPTIMIZERS[name]
    model = getattr(models, way)(models.model(dtype), mesh)
    optimizer = make(model)
    for _ in range(2):
        optimizer.step(models.objective(model, models.batch()))
    saved = gathered({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    optimizer.step(models.objective(model, models.batch()))
    after, is_first = gathered(model.state_dict()), mesh.get_rank() == 0
    again = resumed(mesh, way, name, saved, keep=is_first)
    assert all(torch.equal(value, after[key]) if is_first else value is None for key, value in again.items())
    return (saved, after) if is_first else None


def resumed(mesh, way, name, saved, keep=True):
    """Go on from whole tensors in another number of processes; the weights after a step, whole."""
    make, dtype = OPTIMIZERS[name]
    plain = models.model(dtype)
    plain.load_state_dict(saved["model"])
    model = plain if mesh is None else getattr(models, way)(plain, mesh)
    optimizer = make(model)
    optimizer.load_state_dict(saved["optimizer"])
    optimizer.step(models.objective(model, models.batch()))
    return gathered(model.state_dict(), keep=keep)


REFUSED = {
    "hizoo": "scaled by the state of every element",
    "FSDP1": "Shard the model by FSDP2 instead",
    "data parallel": "Give the model as it is (its .module)",
    "tied in two calls": "by one call",
    "tied in one call": "by one call",
    "replaced after a pass": "tied or replaced after fully_shard",
    "unread": "were not read by the forward pass: unused.weight",
    "unread shard": "were not read by the forward pass: unused.weight",
    "partial": "Partial",
    "two dimensions": "along one dimension (Shard)",
    "forward_grad": "loses its tangent",
    "directions of examples": "cannot exchange activations of",
    "magnitude": 'mask="random"',
}


def refusals(mesh):
    """What is said of each thing that shards cannot do."""
    tokens = models.batch()

    def with_unused(shard):
        model = models.model()
        model.unused = nn.Linear(4, 4, bias=False)
        if shard == models.tensor_parallel:
            model.unused.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
        model = shard(model, mesh)
        zo.zo_sgd(model, lr=0.1).step(models.objective(model, tokens))

    def placed(mesh, *placements):
        model = nn.Module()
        model.w = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, placements, run_check=False))
        zo.zo_sgd(model, lr=0.1)

    def forward_grad():
        model = models.tensor_parallel(models.model(), mesh)
        zo.forward_grad(model, lr=0.1).step(models.objective(model, tokens))

    def directions_of_examples():
        model = models.tensor_parallel(models.model(), mesh)
        zo.grzo(model, lr=0.1).step(models.objective_of_examples(model, tokens))

    def tied_afterwards(*parts):
        model = models.model()
        model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
        for part in (*(getattr(model, name) for name in parts), model):
            fully_shard(part, mesh=mesh)
        model.head.weight = model.embed.weight
        zo.zo_sgd(model, lr=0.1)

    def replaced_after_a_pass():
        model = models.fsdp(models.model(), mesh)
        models.objective(model, tokens)()
        model.reshard()
        model.mix.bias = nn.Parameter(distribute_tensor(torch.ones(models.WIDTH), mesh, [Shard(0)]))
        zo.zo_sgd(model, lr=0.1)

    square = init_device_mesh("cpu", (1, mesh.size()))
    tries = {
        "unread": lambda: with_unused(models.fsdp),
        "unread shard": lambda: with_unused(models.tensor_parallel),
        "partial": lambda: placed(mesh, Partial()),
        "two dimensions": lambda: placed(square, Shard(0), _StridedShard(0, split_factor=2)),
        "forward_grad": forward_grad,
        "directions of examples": directions_of_examples,
        "hizoo": lambda: zo.hizoo(models.fsdp(models.model(), mesh), 0.1),
        "FSDP1": lambda: zo.zo_sgd(FullyShardedDataParallel(models.model(), device_id=torch.device("cpu")), 0.1),
        "data parallel": lambda: zo.zo_sgd(nn.parallel.DistributedDataParallel(models.model()), 0.1),
        "tied in two calls": lambda: tied_afterwards("embed"),
        "tied in one call": lambda: tied_afterwards(),
        "replaced after a pass": replaced_after_a_pass,
        "magnitude": lambda: zo.zo_sgd(
            models.fsdp(models.model(), mesh), 0.1, sampler=zo.sparse(zo.gaussian, 0.5, mask="magnitude")
        ),
    }
    return {name: _said(attempt) for name, attempt in tries.items()}


def _said(attempt):
    try:
        attempt()
    except zo.ZotuneError as error:
        return str(error)
    return "nothing"


def whole_tensors(mesh):
    """Whether what is said of a tensor in shards is what is said of the whole tensor."""
    plain, model = models.model(), models.fsdp(models.model(), mesh)
    name, u = "layers.0.up.weight", zo.Direction(5, zo.gaussian)
    ours, theirs = zo.zo_adam(model, 0.1), zo.zo_adam(plain, 0.1)
    estimate = zo.GradientEstimate(0.5, ((2.0, u),), 2)
    closure = lambda m: m.layers[0].up.weight.square().sum() + models.objective(m, models.batch())()  # noqa: E731
    with torch.no_grad(), zo.perturbed(model, u, 0.1), zo.perturbed(plain, u, 0.1):
        outside = abs(float(whole(closure(model))) - float(closure(plain))) < 1e-4
    return {
        "direction": torch.equal(u.of(model, name), u.of(plain, name)),
        "estimate": torch.equal(estimate.of(model, name), estimate.of(plain, name)),
        "description": describe_tensors(ours) == describe_tensors(theirs),
        "size": ours.tuned.numel == theirs.tuned.numel,
        "read outside of its module": outside,
        "other numbers": ours.tuned.agreed([float(mesh.get_rank()), 7.1]) == [(mesh.size() - 1) / 2, 7.1],
    }
