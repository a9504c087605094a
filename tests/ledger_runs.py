"""Runs of the library with a ledger, of every method, which several test files replay."""

import copy
import math

import torch
from torch import nn

import zotune as zo
from zotune.ledger import LedgerWriter
from zotune.ledger.replay import header_of, record_to

METHODS = {
    "sgd": lambda m, **o: zo.zo_sgd(m, lr=2e-2, mu=1e-2, **o),
    "sgd, two queries, one-sided": lambda m, **o: zo.zo_sgd(
        m, lr=2e-2, mu=1e-2, num_queries=2, difference=zo.forward_difference, **o
    ),
    "sign": lambda m, **o: zo.zo_sgd_sign(m, lr=2e-2, mu=1e-2, num_queries=3, **o),
    "momentum": lambda m, **o: zo.zo_sgd_mmt(m, lr=2e-2, mu=1e-2, **o),
    "conservative": lambda m, **o: zo.zo_sgd_cons(m, lr=0.05, mu=1e-2, **o),
    "adam, decay, limit": lambda m, **o: zo.zo_adam(
        m, lr=2e-2, mu=1e-2, num_queries=2, weight_decay=0.1, max_coefficient=0.5, **o
    ),
    "amsgrad": lambda m, **o: zo.zo_adam(m, lr=2e-2, mu=1e-2, adam="amsgrad", **o),
    "adam, window": lambda m, **o: zo.zo_adam(m, lr=2e-2, mu=1e-2, window=3, **o),
    "blocks": lambda m, **o: zo.zo_sgd(m, lr=2e-2, mu=1e-2, blocks=zo.blocks_by_linear(m), **o),
    "blocks one by one, conservative": lambda m, **o: zo.zo_sgd_cons(
        m, lr=0.1, mu=1e-2, blocks=zo.blocks_by_linear(m), block_order="sequential", **o
    ),
    "forward gradient": lambda m, **o: zo.forward_grad(m, lr=2e-2, **o),
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3), nn.Linear(3, 2)
    return nn.Sequential(*layers).to(dtype)


def loss_of(model):
    x = torch.linspace(-1, 1, 20).view(4, 5).to(next(model.parameters()).dtype)
    return lambda: (model(x).float() - 1).square().mean()


def bits_of(model):
    return [p.detach().contiguous().view(torch.uint8).clone() for p in model.state_dict().values()]


def run(make, path, num_steps=8, dtype=torch.float32, *, bad=(), **options):
    """A run with a schedule and some losses that are no numbers; its optimizer, and what the base was."""
    model = network(dtype)
    base = copy.deepcopy(model)
    opt = make(model, seed=3, **options)
    objective = loss_of(model)
    with LedgerWriter.create(path, header_of(opt)) as writer:
        record_to(writer, opt)
        for step in range(num_steps):
            for group in opt.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 + math.cos(0.3 * step)) / 2
            opt.step((lambda: objective() * math.nan) if step in bad else objective)
    return opt, base
