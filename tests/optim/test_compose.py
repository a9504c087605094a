"""Any sampler, method, set of parameters, blocks, hybrid and window work together, or are refused with a reason."""

from functools import partial

import pytest
import torch
from torch import nn

import zotune as zo
from problems import Transformer, all_bits, assert_same_bits
from zotune.apply.line_search import conservative
from zotune.apply.transforms import adam, momentum, sign

SAMPLERS = {
    "rademacher": zo.rademacher,
    "gaussian": zo.gaussian,
    "random mask": zo.sparse(zo.gaussian, 0.3),
    "magnitude mask": zo.sparse(zo.rademacher, 0.3, mask="magnitude", group="layer", interval=2),
}
METHODS = {
    "sgd": zo.zo_sgd,
    "sign": zo.zo_sgd_sign,
    "elementwise": partial(zo.zo_sgd_sign, sign="elementwise"),
    "mmt": zo.zo_sgd_mmt,
    "cons": zo.zo_sgd_cons,
    "adam": zo.zo_adam,
    "forward gradient": lambda model, lr, mu, difference, **options: zo.forward_grad(model, lr, **options),
    "adamm, window": partial(zo.zo_adam, adam="adamm", window=2),
    "cons of adam": lambda model, lr, mu, difference, **options: zo.ZerothOrder(
        model,
        lr,
        estimator=partial(difference, mu=mu),
        transform=partial(adam, beta1=0.9, beta2=0.99, eps=1e-8),
        step=conservative,
        **options,
    ),
    "signs with momentum": lambda model, lr, mu, difference, **options: zo.ZerothOrder(
        model,
        lr,
        estimator=partial(difference, mu=mu),
        coefficient=sign,
        transform=partial(momentum, beta=0.5),
        **options,
    ),
}
SETTINGS = ("plain", "joint", "sequential", "hybrid of blocks")


class Adapted(nn.Module):
    """A linear layer that is frozen, with a low-rank adapter whose second factor begins as zero."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a, self.b = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.layer(x) + self.b(self.a(x))


def make(tuning):
    model = Transformer(2)
    if tuning == "adapter":
        for p in model.parameters():
            p.requires_grad_(False)
        for layer in model.layers:
            layer.self_attn, layer.mlp_up = Adapted(layer.self_attn), Adapted(layer.mlp_up)
    return model.eval()


def begin(model, method, setting, **options):
    if setting.startswith("hybrid"):
        shallow, deep = zo.split_at_layer(model, 1, model, tied="zeroth_order")
        names = tuple(t.name for t in zo.ParameterSet(model, shallow))
        if setting == "hybrid of blocks":
            options["blocks"] = [zo.Block("odd", names[1::2]), zo.Block("even", names[::2])]
        return zo.Hybrid(method(model, params=shallow, **options), torch.optim.Adam(deep, lr=1e-2))
    if setting != "plain":
        options |= {"blocks": zo.blocks_by_part(model), "block_order": setting}
    return method(model, **options)


@pytest.mark.sample(5)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("tuning", "difference"), [("full", zo.forward_difference), ("adapter", zo.central_difference)]
)
def test_everything_goes_with_everything(sampler, method, setting, tuning, difference):
    options = {
        "lr": 1e-3,
        "mu": 1e-2,
        "sampler": SAMPLERS[sampler],
        "num_queries": 1 + (method == "sgd"),
        "difference": difference,
    }
    if sampler == "magnitude mask" and "window" in method:
        with pytest.raises(zo.UsageError, match="window"):
            begin(make(tuning), METHODS[method], setting, **options)
        return
    ends = []
    for _ in range(2 if tuning == "adapter" else 1):
        model = make(tuning)
        before = all_bits(model)
        opt = begin(model, METHODS[method], setting, **options)
        losses = [opt.step(model) for _ in range(2)]
        assert all(torch.isfinite(torch.tensor(losses)))
        moved = {name for name, now in all_bits(model).items() if not torch.equal(now, before[name])}
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert not moved & frozen
        if "cons" not in method:
            assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
        ends.append((losses, model))
    assert ends[0][0] == ends[-1][0]
    assert_same_bits(ends[0][1], ends[-1][1])
