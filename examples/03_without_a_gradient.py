"""Optimise an objective without a gradient: balance a pole on a cart, rewarded by the number of steps it stands.

The simulator is NumPy code that torch does not see, and an action is a push to the left or to the right. Any objective
that can be evaluated can be optimised in this way: accuracy, F1, a test suite.

Equations of motion: Barto, Sutton and Anderson, 1983.
"""

import numpy as np
import torch
from torch import nn

import zotune as zo

NUM_STEPS, SECONDS = 200, 0.02
GRAVITY, CART, POLE, HALF_LENGTH, FORCE = 9.8, 1.0, 0.1, 0.5, 10.0  # m/s², kg, kg, m, N
EDGE, FALLEN = 2.4, np.radians(12)


def starts(seed: int, num_carts: int) -> np.ndarray:
    """Return positions, speeds, angles and angular speeds of carts that are nearly at rest: shape (4, carts)."""
    return np.random.default_rng(seed).uniform(-0.05, 0.05, (4, num_carts))


@torch.no_grad()
def steps_balanced(policy: nn.Module, carts: np.ndarray) -> float:
    """Return the mean number of steps, of `NUM_STEPS`, that the poles stay up; the policy's sign is the push."""
    x, v, angle, spin = carts
    up, total = np.ones(len(x), dtype=bool), 0.0
    for _ in range(NUM_STEPS):
        states = torch.tensor(np.stack([x, v, angle, spin], axis=1), dtype=torch.float32)
        force = FORCE * np.sign(policy(states).numpy()[:, 0])
        push = (force + POLE * HALF_LENGTH * spin**2 * np.sin(angle)) / (CART + POLE)
        inertia = HALF_LENGTH * (4 / 3 - POLE * np.cos(angle) ** 2 / (CART + POLE))
        turn = (GRAVITY * np.sin(angle) - np.cos(angle) * push) / inertia
        x, angle = x + SECONDS * v, angle + SECONDS * spin
        v, spin = (
            v + SECONDS * (push - POLE * HALF_LENGTH * turn * np.cos(angle) / (CART + POLE)),
            spin + SECONDS * turn,
        )
        up &= (abs(x) < EDGE) & (abs(angle) < FALLEN)
        total += up.mean()
    return total


policy = nn.Linear(4, 1, bias=False)
nn.init.zeros_(policy.weight)
test_carts = starts(seed=12345, num_carts=100)
before = steps_balanced(policy, test_carts)

# The objective is piecewise constant: μ must be about as long as its steps, and only the sign of a difference is used.
optimizer = zo.zo_sgd_sign(policy, lr=0.2, mu=0.5, num_queries=4)
for step in range(12):
    carts = starts(seed=step, num_carts=16)
    loss = optimizer.step(lambda carts=carts: -steps_balanced(policy, carts))  # a plain number
    print(f"step {step + 1:2d}   {-loss:5.1f} steps balanced, mean of the probes")

after = steps_balanced(policy, test_carts)
print(f"on 100 other carts: {before:.1f} of {NUM_STEPS} steps before, {after:.1f} after")
print(f"{optimizer.num_forwards} evaluations; the policy is {policy.weight.tolist()}")
assert before < 60
assert after > 180
