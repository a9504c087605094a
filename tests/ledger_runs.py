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

# Methods beyond the paper; those of the second table make directions of a shape of their own.
LATER = {
    "fzoo": lambda m, **o: zo.fzoo(m, lr=5e-3, mu=1e-2, num_queries=4, **o),
    "randopt": lambda m, **o: zo.randopt(m, lr=0.05, mu=0.05, num_queries=4, keep=2, **o),
    "one block": lambda m, **o: zo.block_coordinate(m, lr=2e-2, mu=1e-2, num_queries=2, **o),
    "one block, adaptive, unbiased": lambda m, **o: zo.block_coordinate(
        m, lr=1e-2, mu=1e-2, choice="adaptive", unbiased=True, blocks=zo.blocks_by_linear(m), **o
    ),
}
IN_SUBSPACES = {
    "subzero": lambda m, **o: zo.subzero(m, lr=2e-2, mu=1e-2, rank=2, interval=3, num_queries=2, **o),
    "lozo": lambda m, **o: zo.lozo(m, lr=2e-2, mu=1e-2, interval=3, scale="sum", **o),
    "lozo, momentum, decay": lambda m, **o: zo.lozo(m, lr=2e-2, mu=1e-2, interval=3, beta=0.8, weight_decay=0.1, **o),
    "hizoo": lambda m, **o: zo.hizoo(m, lr=2e-2, mu=1e-2, alpha=1e-2, num_queries=2, **o),
    "zo_muon": lambda m, **o: zo.zo_muon(m, lr=2e-2, mu=1e-2, rank=3, interval=3, vector_lr=1e-2, **o),
    "mopi, blocks": lambda m, **o: zo.mopi(
        m,
        lr=2e-2,
        mu=1e-2,
        rank=3,
        interval=3,
        top=2,
        num_queries=2,
        vector_lr=1e-2,
        blocks=zo.blocks_by_linear(m),
        **o,
    ),
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
