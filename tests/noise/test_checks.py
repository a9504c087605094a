"""Whatever a kernel cannot read is refused in words before its memory is looked at: no crash, no wrong number.

Each refusal is tried on every function of the noise that takes a tensor of that place.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import zotune as zo
from zotune import noise
from zotune.model.parameters import ParameterSet
from zotune.noise import RADEMACHER

pytestmark = pytest.mark.usefixtures("kernels")

N, M = 600, 20
SEED, ID = 7, 9


def fine(dtype=torch.float32):
    return torch.ones(N, dtype=dtype)


# By function: a call with one tensor in the place of each that it reads or writes; the others are as they should be.
ALONE = ("fill", "mask", "add, in place", "foreach", "rows", "products, left")
VIEWED = ("rows", "round rows", "thin, x", "products, left")  # what is viewed, torch itself may refuse to view
PLACES = {
    "fill": lambda t: noise.fill(t, RADEMACHER, SEED, ID),
    "mask": lambda t: noise.mask(t, 0.5, SEED, ID),
    "add, out": lambda t: noise.add(t, fine(), RADEMACHER, [SEED], [0.1], ID),
    "add, x": lambda t: noise.add(fine(), t, RADEMACHER, [SEED], [0.1], ID),
    "add, in place": lambda t: noise.add(t, t, RADEMACHER, [SEED], [0.1], ID),
    "pair, plus": lambda t: noise.axpy_pair(t, fine(), fine(), RADEMACHER, SEED, 0.1, ID),
    "pair, minus": lambda t: noise.axpy_pair(fine(), t, fine(), RADEMACHER, SEED, 0.1, ID),
    "pair, x": lambda t: noise.axpy_pair(fine(), fine(), t, RADEMACHER, SEED, 0.1, ID),
    "foreach": lambda t: noise.foreach_axpy_([fine(), t], [1, 2], RADEMACHER, [SEED], [0.1]),
    "rows": lambda t: noise.add_rows(t.view(M, -1), torch.arange(M), RADEMACHER, SEED, 0.1, ID),
    "round, out": lambda t: noise.round_to(t, fine(), SEED, ID),
    "round, y": lambda t: noise.round_to(fine(torch.bfloat16), t, SEED, ID),
    "round rows": lambda t: noise.round_rows(
        torch.ones(M, N // M, dtype=torch.bfloat16), t.view(M, -1), torch.arange(M), SEED, ID
    ),
}
PRODUCTS = {
    "products, x": lambda t: noise.add_products(fine(), t, [(torch.ones(M, 1), torch.ones(N // M, 1))], [0.1], ID),
    "products, left": lambda t: noise.add_products(
        fine(), fine(), [(t[:M].view(M, 1), torch.ones(N // M, 1))], [0.1], ID
    ),
    "thin, x": lambda t: noise.low_rank_matmul_add_(
        torch.ones(M, 4), t.view(M, -1), [(torch.ones(4, 1), torch.ones(N // M, 1))], [0.1]
    ),
}
STEPS = {
    "step, x": lambda t: stepped(t, [fine()]),
    "step, state": lambda t: stepped(fine(), [t]),
}


def stepped(x, states):
    constants = torch.zeros(9).numpy()
    noise.step(x, states, 0, constants, (RADEMACHER, [SEED], [0.1]), None, ID, 0, first=False, writes=True)


@pytest.fixture
def places(kernels):
    with_kernels = {} if kernels.name == "eager" else PRODUCTS | STEPS
    return PLACES | with_kernels


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def refused(places, make, match=None, but=()):
    """Every function refuses the tensor that `make` makes, in words that name what is wrong."""
    for name, call in places.items():
        if name not in but:
            with pytest.raises(zo.UsageError, match=match):
                call(made := make())
                pytest.fail(f"{name} takes {made}")


def test_a_distributed_tensor_is_refused(places, mesh):
    made = distribute_tensor(fine(), mesh, [Shard(0)])
    refused(places, lambda: made, "DTensor stands for numbers that lie elsewhere", VIEWED)


def test_a_fake_tensor_is_refused(places):
    with FakeTensorMode():
        fake = torch.ones(N)
    refused(places, lambda: fake, "FakeTensor", VIEWED)


def test_a_tensor_of_another_device_is_refused(places):
    refused(places, lambda: fine().to("meta"), but=ALONE[:3])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.complex64, torch.bool], ids=str)
def test_a_tensor_of_another_dtype_is_refused(places, dtype):
    refused(places, lambda: fine().to(dtype), str(dtype).removeprefix("torch."))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_tensor_is_refused(places):
    refused(places, lambda: torch.quantize_per_tensor(fine(), 0.1, 0, torch.qint8), "qint8", VIEWED)


def test_a_sparse_tensor_is_refused(places):
    refused(places, lambda: fine().to_sparse(), "layout torch.sparse_coo", VIEWED)


def test_gaps_between_numbers_are_refused(places):
    refused(places, lambda: torch.ones(2 * N)[::2], "gaps", VIEWED)


@pytest.mark.parametrize("size", [0, N - M, 2 * N])
def test_a_tensor_of_another_size_is_refused(places, size):
    refused(places, lambda: torch.ones(size), but=ALONE)


def test_memory_that_was_freed_is_refused(places):
    def freed():
        t = fine()
        t.untyped_storage().resize_(0)
        return t

    refused(places, freed, "was freed", VIEWED)


def test_views_whose_numbers_are_computed_are_refused(places):
    refused(places, lambda: torch._neg_view(fine()), "view of numbers")


def test_tensors_that_overlap_in_part_are_refused():
    memory = torch.ones(3 * N)
    a, b, c = memory[:N], memory[N // 2 : N // 2 + N], memory[2 * N :]
    with pytest.raises(zo.UsageError, match="share a part"):
        noise.add(a, b, RADEMACHER, [1], [0.1], ID)
    with pytest.raises(zo.UsageError, match="share a part"):
        noise.axpy_pair(a, b, c, RADEMACHER, 1, 0.1, ID)
    with pytest.raises(zo.UsageError, match="written over x"):
        noise.axpy_pair(a, c, a, RADEMACHER, 1, 0.1, ID)
    assert (memory == 1).all()


def test_indices_that_do_not_number_the_rows_are_refused():
    rows = torch.ones(M, 5)
    for wrong in (torch.arange(M - 1), torch.arange(M)[:, None], torch.arange(M, device="meta")):
        with pytest.raises(zo.UsageError, match="does not number the rows"):
            noise.add_rows(rows, wrong, RADEMACHER, SEED, 0.1, ID)


@pytest.mark.parametrize(("seeds", "scales"), [([], []), ([1, 2], [0.1]), ([1], [0.1, 0.2])])
def test_seeds_without_scales_are_refused(seeds, scales):
    with pytest.raises(zo.UsageError, match="scales"):
        noise.add(fine(), fine(), RADEMACHER, seeds, scales, ID)
    with pytest.raises(zo.UsageError, match="starts at -1"):
        noise.add(fine(), fine(), RADEMACHER, [1], [0.1], ID, -1)


def test_factors_of_another_matrix_are_refused(kernels):
    if kernels.name == "eager":
        pytest.skip("torch operations have no products of factors")
    left, right = torch.ones(M, 2), torch.ones(N // M, 2)
    for a, b in ((left[:-1], right), (left[:, :1].contiguous(), right), (left, right[:, :1].contiguous())):
        with pytest.raises(zo.UsageError, match="are not those of 20 rows of 30 columns"):
            noise.add_products(fine(), fine(), [(a, b)], [0.1], ID)
    with pytest.raises(zo.UsageError, match="equal shares"):
        noise.low_rank_matmul_add_(
            torch.ones(5, 4), torch.ones(5, 3), [(torch.ones(4, 1), torch.ones(3, 1))] * 2, [1, 1]
        )
    with pytest.raises(zo.UsageError, match="bias"):
        ones = torch.ones(4, 1), torch.ones(3, 1)
        noise.low_rank_matmul_add_(torch.ones(5, 4), torch.ones(5, 3), [ones], [1], torch.ones(1, 3))


# The same from the optimizers, as users meet it ---------------------------------------------------------------


def test_a_model_distributed_over_one_process_is_tuned_as_a_plain_one(mesh):
    plain, model = nn.Module(), nn.Module()
    plain.w = nn.Parameter(torch.ones(8, 4))
    model.w = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
    for one in (plain, model):
        zo.zo_adam(one, lr=0.1).step(lambda m=one: m.w.pow(3).sum())
    assert torch.equal(model.w.to_local(), plain.w)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_of_float8_are_refused_by_name(dtype):
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.zeros(4).to(dtype))
    with pytest.raises(zo.UsageError, match=r"'scale' has dtype torch\.float8.*adapter"):
        zo.zo_sgd(model, lr=0.1)
    model.scale.requires_grad_(False)
    zo.zo_sgd(model, lr=0.1).step(lambda: (model(torch.ones(1, 2)) * (1 + model.scale.float().sum())).sum())


def test_sparse_weights_are_refused_by_name():
    model = nn.Module()
    model.w = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(zo.UsageError, match=r"'w' has layout torch\.sparse_coo"):
        ParameterSet(model)


METHODS = {
    "adam": lambda m: zo.zo_adam(m, lr=0.1),
    "momentum": lambda m: zo.zo_sgd_mmt(m, lr=0.1),
    "sparse": lambda m: zo.zo_sgd(m, lr=0.1, sampler=zo.sparse(zo.gaussian, 0.5)),
    "by magnitude": lambda m: zo.zo_sgd(m, lr=0.1, sampler=zo.sparse(zo.rademacher, 0.5, mask="magnitude")),
    "low rank": lambda m: zo.zo_sgd(m, lr=0.1, sampler=zo.low_rank(zo.rademacher)),
    "conservative": lambda m: zo.zo_sgd_cons(m, lr=0.1),
    "window": lambda m: zo.zo_adam(m, lr=0.1, window=3),
    "master": lambda m: zo.zo_sgd(m.bfloat16(), lr=0.1, rounding="master"),
    "forward": lambda m: zo.forward_grad(m, lr=0.1),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_default_device_changes_nothing_about_a_step(method):
    """`meta` stands for an accelerator that is the default while the model is on the CPU."""
    torch.manual_seed(0)
    here = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))
    there, ids = copy.deepcopy(here), torch.tensor([1, 3, 3])
    for model, device in ((here, "cpu"), (there, "meta")):
        opt = METHODS[method](model)
        try:
            torch.set_default_device(device)
            for _ in range(3):
                opt.step(lambda model=model: model(ids).float().square().sum())
        finally:
            torch.set_default_device(None)
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        assert q.device.type == "cpu"
        assert torch.equal(p, q)
