"""Minimise Rosenbrock's function by evaluating it, without its gradient.

The objective is a function of a module's parameters. Any module will do, even one that holds two numbers.
"""

import torch
from torch import Tensor, nn

import zotune as zo


class Point(nn.Module):
    """A point (x, y) of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.xy = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))

    def rosenbrock(self) -> Tensor:
        """(1 - x)² + 100 (y - x²)²: a narrow, curved valley whose lowest point is (1, 1)."""
        x, y = self.xy
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2


point = Point()
optimizer = zo.zo_sgd_mmt(point, lr=4e-4, mu=1e-4, beta=0.93, num_queries=2)

# An estimate takes two forward passes for each direction. It does not change the point, not even by a bit.
estimate = optimizer.estimate(point.rosenbrock)
print(f"f(-1.2, 1) = 24.2; gradient [-215.6, -88.0], estimated as {estimate.of(point, 'xy').tolist()}")
assert point.xy.tolist() == [-1.2, 1.0]

for step in range(1200):
    optimizer.step(point.rosenbrock)  # the closure returns the value; it never calls backward
    if (step + 1) % 200 == 0:
        x, y = point.xy.tolist()
        print(f"step {step + 1:4d}   f({x:.4f}, {y:.4f}) = {point.rosenbrock().item():.1e}")

print(f"{optimizer.num_forwards} evaluations and no gradient: point.xy.grad is {point.xy.grad}")
assert point.rosenbrock().item() < 1e-2
assert point.xy.grad is None
