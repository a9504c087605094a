"""N processes take the steps of one, to the bit: every method, at any split of micro-batches and directions.

The short form takes two steps of each case at one of two splits, the slow one three steps at every split.
"""

import pytest
import torch

import many_cases
import many_processes

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


# Extents of the mesh, processes that share the directions, and the micro-batches; cases; and steps.
SHORT = [(1, 3, CASES[::2], 2), (2, 2, CASES[1::2], 2)]
WHOLE = [
    pytest.param(query, data, CASES, 3, marks=pytest.mark.slow) for query, data in ((1, 2), (1, 3), (2, 1), (2, 2))
]


@pytest.mark.filterwarnings("ignore:probes of")
@pytest.mark.parametrize(("query", "data", "cases", "steps"), [*SHORT, *WHOLE])
def test_steps_of_a_mesh_have_the_bits_of_one_process(query, data, cases, steps):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = [many_cases.steps_of(name, 1, 1, dtype, kind, steps=steps) for name, dtype, kind in cases]
    torch.set_num_threads(threads)
    meshes = [(name, query, data, dtype, kind, 4, steps) for name, dtype, kind in cases]
    for found in many_processes.run(query * data, many_cases.many_steps, meshes):
        for case, one, other in zip(cases, expected, found, strict=True):
            assert repr(other) == repr(one), case
