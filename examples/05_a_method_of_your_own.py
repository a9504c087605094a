"""Write a method of your own: a sampler, a transform and a limit of a few lines each, composed as in the library.

A method is direction → estimate → transform → apply, and `ZerothOrder` takes each as a plain value. This one has
directions with uniformly distributed entries and the Lion rule (Chen et al., 2023, arXiv 2302.06675).
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import zotune as zo


@dataclass(frozen=True)
class Uniform:
    """Entries uniform on [-√3, √3], so that they have mean 0 and variance 1, as a sampler must.

    Entry j depends on (seed, tensor, j) only, because the Gaussian entry from which it is computed does.
    """

    def fill(self, out: Tensor, seed: int, tensor_id: int, start: int) -> None:
        """Write entries start, start + 1, … for one tensor into `out`."""
        zo.gaussian.fill(out, seed, tensor_id, start)
        out.div_(math.sqrt(2)).erf_().mul_(math.sqrt(3))


def lion(gradient: Tensor, state: dict[str, Tensor], *, beta1: float, beta2: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the step sign(β₁ m + (1 - β₁) ĝ) and the new m ← β₂ m + (1 - β₂) ĝ; the first m is 0."""
    m = state.get("exp_avg", torch.zeros_like(gradient))
    step = (beta1 * m + (1 - beta1) * gradient).sign()
    return step, {"exp_avg": beta2 * m + (1 - beta2) * gradient}


def zo_lion(model: nn.Module, lr: float, **options: object) -> zo.ZerothOrder:
    """Return the method, one expression like those of `zo.METHODS`. Coefficients are clipped to ± 1."""
    return zo.ZerothOrder(model, lr, transform=partial(lion, beta1=0.9, beta2=0.98), max_coefficient=1.0, **options)


def network() -> nn.Module:
    """Return a small network, with the same initial weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))


# Does a point of the plane lie to the right of a parabola?
torch.manual_seed(1)
x = torch.randn(256, 2)
y = (x[:, 0] > x[:, 1] ** 2 - 1).long()

for name, make in (
    ("ZO-SGD", lambda model: zo.zo_sgd(model, lr=0.2, num_queries=2)),
    ("ZO-Adam", lambda model: zo.zo_adam(model, lr=0.02, num_queries=2)),
    ("ZO-Lion, uniform", lambda model: zo_lion(model, lr=0.01, num_queries=2, sampler=Uniform())),
):
    model = network()
    optimizer = make(model)
    before = nn.functional.cross_entropy(model(x), y).item()
    for _ in range(300):
        optimizer.step(lambda model=model: nn.functional.cross_entropy(model(x), y))
    after = nn.functional.cross_entropy(model(x), y).item()
    print(f"{name:18} loss {before:.3f} to {after:.3f} in {optimizer.num_forwards} forward passes")
    assert after < 0.5 * before

u = zo.Direction(seed=7, sampler=Uniform())
entries = torch.cat([u.of(nn.Linear(300, 300), name).flatten() for name in ("weight", "bias")]).double()
print(f"entries of a direction: mean {entries.mean():.3f}, variance {entries.var():.3f}, largest {entries.max():.3f}")
assert abs(entries.mean()) < 0.02
assert abs(entries.var() - 1) < 0.02
