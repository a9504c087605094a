"""A run that is stopped and taken up from its state dict is the run that was not stopped, to the bit."""

from functools import partial

import pytest
import torch

import zotune as zo
from problems import Problem, Transformer, assert_same_bits

METHODS = {
    "sgd": zo.zo_sgd,
    "sign": zo.zo_sgd_sign,
    "cons": zo.zo_sgd_cons,
    "mmt": zo.zo_sgd_mmt,
    **{adam: partial(zo.zo_adam, adam=adam) for adam in ("torch", "amsgrad")},
    "mmt window": partial(zo.zo_sgd_mmt, window=3),
    "adam window": partial(zo.zo_adam, window=3),
    "fzoo": zo.fzoo,
    "randopt": zo.randopt,
    "one block": partial(zo.block_coordinate, choice="adaptive"),
    "hizoo": partial(zo.hizoo, alpha=1e-2),
    "lozo": partial(zo.lozo, beta=0.8, interval=3),
    "zo_muon": partial(zo.zo_muon, rank=3, interval=3, vector_lr=0.01),
    "mopi": partial(zo.mopi, rank=3, top=2, interval=3, vector_lr=0.01),
}
OWN_DIRECTIONS = ("hizoo", "lozo", "zo_muon", "mopi")
BLOCKS = {
    "plain": lambda model: {},
    "joint": lambda model: {"blocks": zo.blocks_by_part(model)},
    "sequential": lambda model: {"blocks": zo.blocks_by_layer(model), "block_order": "sequential"},
}
SAMPLERS = {
    "dense": zo.gaussian,
    "random": zo.sparse(zo.gaussian, 0.4, interval=3),
    "magnitude": zo.sparse(zo.rademacher, 0.4, mask="magnitude", interval=3),
}


def begin(method, blocks, sampler, dtype, rounding, seed=5):
    p = Problem(Transformer(1, width=4, words=6).to(dtype))
    ids = Transformer.IDS % 6
    options = {"num_queries": 2, "weight_decay": 0.1, "seed": seed, "mu": 0.05, "rounding": rounding}
    opt = METHODS[method](p.model, 0.02, sampler=SAMPLERS[sampler], **options, **BLOCKS[blocks](p.model))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)

    def go(steps):
        losses = []
        for _ in range(steps):
            losses.append(opt.step(lambda: p.model(ids)))
            scheduler.step()
        return losses

    return p.model, opt, scheduler, go


@pytest.mark.sample(9)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, "master")], ids=str)
def test_going_on_in_the_middle_of_a_masks_interval_equals_not_stopping(
    method, blocks, sampler, dtype, rounding, tmp_path
):
    if sampler == "magnitude" and "window" in method:
        pytest.skip("refused")
    if (method in OWN_DIRECTIONS and sampler != "dense") or (method == "one block" and blocks == "sequential"):
        pytest.skip("refused, or there is nothing to put in an order")
    model, opt, scheduler, go = begin(method, blocks, sampler, dtype, rounding)
    go(4)
    torch.save((model.state_dict(), opt.state_dict(), scheduler.state_dict()), tmp_path / "saved.pt")
    straight = go(3)
    again, resumed, resumed_scheduler, go_on = begin(method, blocks, sampler, dtype, rounding, seed=99)
    go_on(1)  # what was there before must not matter
    weights, state, schedule = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    resumed_scheduler.load_state_dict(schedule)
    assert go_on(3) == straight
    assert_same_bits(model, again)
    for name in ("seed", "num_steps", "num_skipped", "num_forwards"):
        assert getattr(resumed, name) == getattr(opt, name)


def test_a_state_of_a_run_that_has_not_begun_begins_it_anew():
    runs = []
    for warm in (False, True):
        model, opt, _, go = begin("mmt window", "plain", "random", torch.float32, "nearest")
        weights, state = {k: v.clone() for k, v in model.state_dict().items()}, opt.state_dict()
        if warm:
            with torch.no_grad():  # other weights, so other ratios of the masks
                model.embed.mul_(10)
            go(1)
            model.load_state_dict(weights)
            opt.load_state_dict(state)
            for group in opt.param_groups:
                group["lr"] = 0.02
        opt.step(lambda model=model: model(Transformer.IDS % 6))
        runs.append(model)
    assert_same_bits(*runs)
