"""`make test` keeps each value of each parameter of a test; `make test-slow` has the other combinations."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

import conftest


class Case:
    """What a collected test is to the hook that splits."""

    def __init__(self, test, slow=False, file="test_some.py", sample=None, **params):
        self.nodeid = f"tests/{file}::{test}[{'-'.join(map(str, params.values()))}]"
        self.path, self.callspec = Path(file), SimpleNamespace(params=params)
        self.marks = {"slow": pytest.mark.slow} if slow else {}
        if sample:
            self.marks["sample"] = pytest.mark.sample(sample)

    def get_closest_marker(self, name):
        return self.marks.get(name)

    def add_marker(self, mark):
        self.marks[mark.name] = mark


def fast(cases):
    """The parameters of the cases that are in `make test`."""
    conftest.pytest_collection_modifyitems(cases)
    return [case.callspec.params for case in cases if "slow" not in case.marks]


def values(params):
    return {pair for each in params for pair in each.items()}


@pytest.mark.parametrize("sizes", [(2, 3), (5, 5), (1, 4), (3, 2, 4), (2, 2, 2, 2)], ids=str)
def test_each_value_of_each_parameter_stays_in_few_cases(sizes):
    axes = [[f"{axis}{i}" for i in range(size)] for axis, size in zip("abcd", sizes, strict=False)]
    every = [dict(zip("abcd", combination, strict=False)) for combination in product(*axes)]
    kept = fast([Case("test_a", **params) for params in every])
    assert values(kept) == values(every)
    assert max(sizes) <= len(kept) <= sum(sizes)
    if len(every) > sum(sizes):
        assert len(kept) < len(every)


def test_values_that_print_alike_are_told_apart_by_their_content():
    cases = [Case("test_a", x=x, y=y) for x in ([1, 2], [1, 3]) for y in ("p", "q")]
    for i, case in enumerate(cases):
        case.nodeid = f"tests/test_some.py::test_a[x{i}]"
    assert [sorted({str(params[name]) for params in fast(cases)}) for name in "xy"] == [
        ["[1, 2]", "[1, 3]"],
        ["p", "q"],
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_a_case_that_is_slow_by_its_own_mark_stands_for_no_value(order):
    cases = [Case("test_a", slow=size == "full", size=size, of=of) for size in ("small", "full") for of in range(4)]
    kept = fast(cases[::order])
    assert values(kept) == {("size", "small"), *(("of", i) for i in range(4))}


def test_each_test_is_split_alone_and_one_parameter_is_not_split():
    cases = [Case(test, x=x, y=y) for test in ("test_a", "test_b") for x in range(2) for y in range(2)]
    single = [Case("test_c", x=x) for x in range(9)]
    frozen = [Case("test_d", file="test_frozen.py", x=x, y=y) for x in range(2) for y in range(2)]
    assert len(fast(single)) == 9
    assert len(fast(frozen)) == 4
    fast(cases)
    for test in ("test_a", "test_b"):
        kept = [case.callspec.params for case in cases if test in case.nodeid and "slow" not in case.marks]
        assert values(kept) == {(name, i) for name in "xy" for i in range(2)}


@pytest.mark.parametrize("order", [1, -1])
def test_a_sample_has_as_many_cases_as_it_says_and_none_that_is_slow_by_its_own_mark(order):
    cases = [Case("test_a", slow=x > 5, sample=4, x=x, y=y) for x in range(8) for y in range(3)]
    few = [Case("test_b", sample=4, x=x) for x in range(3)]
    kept = fast(cases[::order])
    assert len(kept) == 4
    assert max(params["x"] for params in kept) <= 5
    assert sorted(map(str, kept)) == sorted(
        map(str, fast([Case("test_a", sample=4, **c.callspec.params) for c in cases if c.callspec.params["x"] <= 5]))
    )
    assert len(fast(few)) == 3


def test_the_choice_does_not_depend_on_the_order_of_collection():
    cases = [Case("test_a", x=x, y=y, z=z) for x, y, z in product(range(3), range(4), range(2))]
    again = [Case("test_a", **case.callspec.params) for case in cases]
    kept, other = fast(cases), fast(again[::-1])
    assert sorted(map(str, kept)) == sorted(map(str, other))
