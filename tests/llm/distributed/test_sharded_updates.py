"""Updates of a model in shards have the bits of the unsharded model's, for the same coefficients.

A short form runs on two processes; the whole matrix, on two and three, is `slow`: `make test-distributed`.
"""

import pytest
import sharded_cases as cases
import torch
from sharded_cases import run

SIZES = {
    "even": {"width": 12, "inner": 12, "vocabulary": 12},
    "uneven": {},
    "some hold nothing": {"width": 6, "inner": 2, "vocabulary": 7},
}
# What a plan does not go with: tangents, and directions of single examples.
BY_PLAN = [name for name in cases.OPTIMIZERS if name not in ("forward_grad", "grzo")]
WAYS = {"fsdp": list(cases.OPTIMIZERS), "fsdp_by_columns": list(cases.OPTIMIZERS), "tensor_parallel": BY_PLAN}
SHORT = {
    "fsdp": ["zo_sgd", "zo_adam, bfloat16", "state and line search", "low rank"],
    "fsdp_by_columns": ["zo_sgd_mmt", "bfloat16", "sparse"],
    "tensor_parallel": ["zo_sgd", "zo_adam, bfloat16", "zo_sgd_cons", "low rank, bfloat16"],
}


def check(differences, way):
    """Products of whole weights are those of the plain model; products of shards are summed in another order."""
    for name, difference in differences.items():
        half = cases.OPTIMIZERS[name][1] == torch.bfloat16
        limit = 0.0 if way.startswith("fsdp") else 0.02 if half else 1e-5
        assert difference <= limit, f"{way}, {name}: the loss differs by {difference}"


def short(mesh):
    """All that the short form looks at, in one start of the processes."""
    found = {way: cases.steps(mesh, way, names, {}) for way, names in SHORT.items()}
    passes = {way: cases.side_by_side(mesh, way) for way in ("fsdp", "tensor_parallel")}
    saved = [cases.saved_states(mesh, "fsdp", name) for name in cases.RESUMED]
    return found, passes, cases.refusals(mesh), cases.whole_tensors(mesh), saved


@pytest.fixture(scope="module")
def on_two():
    return run(short, 2)


def test_updates_have_the_bits_of_the_unsharded_model(on_two):
    for differences, *_ in on_two:
        for way, found in differences.items():
            check(found, way)


def test_both_ends_of_a_probe_share_a_gather_and_sharded_products_do_not(on_two):
    for _, passes, *_ in on_two:
        (together, once), (apart, twice) = passes["fsdp"]
        assert (once, twice) == (1, 2)
        assert abs(together - apart) < 1e-5
        assert [n for _, n in passes["tensor_parallel"]] == [2, 2]


@pytest.mark.parametrize("what", cases.REFUSED)
def test_what_shards_cannot_do_is_refused_in_every_process(what, on_two):
    for _, _, refusals, *_ in on_two:
        assert cases.REFUSED[what] in refusals[what]


def test_directions_estimates_and_digests_are_those_of_whole_tensors(on_two):
    for *_, same, _ in on_two:
        assert same == dict.fromkeys(same, True) != {}


@pytest.mark.parametrize("number", range(len(cases.RESUMED)))
def test_a_run_goes_on_unsharded_to_the_same_bits(on_two, number):
    saved, after = on_two[0][-1][number]
    assert on_two[1][-1][number] is None
    found = cases.resumed(None, "fsdp", cases.RESUMED[number], saved)
    assert all(torch.equal(value, after[name]) for name, value in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(cases.RESUMED)))
def test_a_run_goes_on_in_another_number_of_processes_to_the_same_bits(on_two, number):
    saved, after = on_two[0][-1][number]
    for way in ("fsdp", "fsdp_by_columns"):
        found = run(cases.resumed, 3, way, cases.RESUMED[number], saved)[0]
        assert all(torch.equal(value, after[name]) for name, value in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_optimizer_has_the_bits_of_the_unsharded_model(way, world, sizes):
    for differences in run(cases.steps, world, way, WAYS[way], SIZES[sizes]):
        check(differences, way)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "world"), [("llama", 2), ("opt", 2), ("opt", 3), ("gpt2", 2), ("gpt2", 3)])
def test_every_optimizer_has_the_bits_of_the_unsharded_model_by_a_plan_of_transformers(family, world):
    """Three processes do not divide the heads of the llama, whose plan gives each of them whole ones."""
    names = [name for name in BY_PLAN if name not in cases.OF_NAMES]
    for differences in run(cases.steps_by_plan, world, family, names):
        check(differences, "tensor_parallel")
