"""Measure the effect of queries, blocks and masks on the noise of an estimate, and compare it with the theory.

ĝ is unbiased but noisy: for d tuned numbers, E‖ĝ - ∇f‖² is about d times ‖∇f‖². For Rademacher directions, to first
order in μ and as a multiple of ‖∇f‖², it is:

    q directions                     (d - 1) / q
    blocks b of d_b numbers          Σ (d_b - 1) ‖∇_b f‖² / ‖∇f‖²
    random mask of sparsity s        d - 1 + s / (1 - s), for ĝ / (1 - s), which is unbiased
    only the k largest weights       ((k - 1) ‖∇_k f‖² + ‖∇f - ∇_k f‖²) / ‖∇f‖², where the second term is a bias
"""

import torch
from torch import Tensor, nn

import zotune as zo

torch.manual_seed(0)
widths = ((6, 8), (8, 8), (8, 1))
layers = [layer for a, b in widths for layer in (nn.Linear(a, b, bias=False), nn.Tanh())]
model = nn.Sequential(*layers[:-1]).double()
x, y = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 1, dtype=torch.float64)
parts = dict(model.named_parameters())


def objective() -> Tensor:
    """Return the mean squared error."""
    return nn.functional.mse_loss(model(x), y)


def measured(optimizer: zo.ZerothOrder, scale: float = 1.0, num_steps: int = 250) -> Tensor:
    """Return ‖scale ĝ - ∇f‖² / ‖∇f‖² of each step. The learning rate is 0, so all steps are at the same x."""
    errors = []

    def note(estimate: zo.GradientEstimate) -> None:
        squares = [(scale * estimate.of(model, name) - gradient[name]).square().sum() for name in parts]
        errors.append(sum(squares) / norm(gradient))

    for _ in range(num_steps):
        optimizer.step(objective, inspect=note)
    return torch.stack(errors)


def norm(tensors: dict[str, Tensor]) -> float:
    """Return the sum of all squares."""
    return float(sum(t.square().sum() for t in tensors.values()))


gradient = dict(zip(parts, torch.autograd.grad(objective(), tuple(parts.values())), strict=True))
total, d, s = norm(gradient), sum(p.numel() for p in parts.values()), 0.5

blocks = zo.blocks_by_layer(model)
by_block = 0.0
for block in blocks:
    of_block = {name: gradient[name] for name in block.tensors}
    by_block += (sum(g.numel() for g in of_block.values()) - 1) * norm(of_block) / total

median = torch.cat([p.detach().flatten() for p in parts.values()]).abs().median()
of_largest = {name: gradient[name] * (p.detach().abs() > median) for name, p in parts.items()}
by_size = ((d / 2 - 1) * norm(of_largest) + total - norm(of_largest)) / total

largest = zo.zo_sgd(model, lr=0.0, sampler=zo.sparse(zo.rademacher, s, mask="magnitude"))
masked = zo.zo_sgd(model, lr=0.0, sampler=zo.sparse(zo.rademacher, s, group="layer"))

print(f"d = {d}, {len(blocks)} blocks\n\n{'':22} passes   noise ± standard error   theory")
for name, optimizer, scale, theory in (
    ("one direction", zo.zo_sgd(model, lr=0.0), 1.0, d - 1),
    ("three directions", zo.zo_sgd(model, lr=0.0, num_queries=3), 1.0, (d - 1) / 3),
    ("three blocks", zo.zo_sgd(model, lr=0.0, blocks=blocks, reuse_prefix=False), 1.0, by_block),
    ("random mask", masked, 1 / (1 - s), d - 1 + s / (1 - s)),
    ("largest half", largest, 1.0, by_size),
):
    errors = measured(optimizer, scale)
    mean, error = errors.mean().item(), errors.std().item() / len(errors) ** 0.5
    passes = optimizer.num_forwards // len(errors)
    print(f"{name:22} {passes:6d} {mean:10.1f} ± {error:4.1f} {theory:18.1f}")
    assert abs(mean - theory) < 4 * error

print(
    "\nA block reduces the noise as much as a direction does, and more if the gradient lies in small blocks. A random"
    "\nmask makes ĝ shorter but not less noisy; a fixed mask trades noise for bias."
)
