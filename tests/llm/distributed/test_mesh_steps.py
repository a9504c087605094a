"""N processes take the steps of one, to the bit: every method, at any split of micro-batches and directions."""

import pytest
import torch

import many_cases
import many_processes

# Extents of the mesh: processes that share the directions, and the micro-batches.
MESHES = [(1, 3), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow), (2, 2)]
NAMES = [*many_cases.STEPS, "hybrid", "blocks", "sequential blocks"]
CASES = [
    *((name, torch.float32, "batched") for name in NAMES),
    *((name, torch.bfloat16, "batched") for name in ("zo_sgd", "zo_adam", "forward_grad", "sparse")),
    *((name, torch.float32, "plain") for name in ("zo_sgd", "one-sided", "zo_sgd_cons", "blocks")),
    *((name, torch.float32, "examples") for name in many_cases.OF_EXAMPLES),
    ("zo_sgd", torch.float32, "accuracy"),
    ("zo_adam", torch.float32, "partly separable"),
    ("zo_adam", torch.float64, "plain"),
]


def one_process(cases):
    torch.set_num_threads(1)
    return [many_cases.steps_of(name, 1, 1, dtype, kind) for name, dtype, kind in cases]


@pytest.mark.filterwarnings("ignore:probes of")
@pytest.mark.parametrize(("query", "data"), MESHES, ids=lambda n: str(n))
def test_steps_of_a_mesh_have_the_bits_of_one_process(query, data):
    threads = torch.get_num_threads()
    expected = one_process(CASES)
    torch.set_num_threads(threads)
    meshes = [(name, query, data, dtype, kind) for name, dtype, kind in CASES]
    for found in many_processes.run(query * data, many_cases.many_steps, meshes):
        for case, one, other in zip(CASES, expected, found, strict=True):
            assert repr(other) == repr(one), case
