"""What queries, blocks and masks do to the noise of an estimate: measured, beside the theory.

ĝ is right on average, and far from the gradient each time: E‖ĝ - ∇f‖² is some d times ‖∇f‖² for d tuned numbers.
For Rademacher directions, to first order in μ, as a multiple of ‖∇f‖²:

    q directions                     (d - 1) / q
    blocks b of d_b numbers          Σ (d_b - 1) ‖∇_b f‖² / ‖∇f‖²
    random mask, share s is zero     d - 1 + s / (1 - s), for ĝ / (1 - s), which is right on average
    the k largest weights alone      ((k - 1) ‖∇_k f‖² + ‖∇f - ∇_k f‖²) / ‖∇f‖², the second term being a bias
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
    """A mean squared error."""
    return nn.functional.mse_loss(model(x), y)


def measured(optimizer: zo.ZerothOrder, scale: float = 1.0, num_steps: int = 250) -> Tensor:
    """‖scale ĝ - ∇f‖² / ‖∇f‖² of each of some steps, all at the same x for the learning rate is 0."""
    errors = []

    def note(estimate: zo.GradientEstimate) -> None:
        squares = [(scale * estimate.of(model, name) - gradient[name]).square().sum() for name in parts]
        errors.append(sum(squares) / norm(gradient))

    for _ in range(num_steps):
        optimizer.step(objective, inspect=note)
    return torch.stack(errors)


def norm(tensors: dict[str, Tensor]) -> float:
    """The sum of all squares."""
    return float(sum(t.square().sum() for t in tensors.values()))


gradient = dict(zip(parts, torch.autograd.grad(objective(), tuple(parts.values())), strict=True))
total, d, s = norm(gradient), sum(p.numel() for p in parts.values()), 0.5

blocks = zo.blocks_by_layer(model)
by_block = 0.0
for block in blocks:
    own = {name: gradient[name] for name in block.tensors}
    by_block += (sum(g.numel() for g in own.values()) - 1) * norm(own) / total

middle = torch.cat([p.detach().flatten() for p in parts.values()]).abs().median()
kept = {name: gradient[name] * (p.detach().abs() > middle) for name, p in parts.items()}
by_size = ((d / 2 - 1) * norm(kept) + total - norm(kept)) / total

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
    "\nA block is worth a direction, and more where the gradient lies in small blocks. A random mask makes ĝ shorter,"
    "\nnot less noisy; a mask that stays where it is trades noise for bias."
)
