"""Options of a run become the optimizer that they name."""

import pytest
import torch
from torch import nn

import zotune as zo
from zotune.errors import UsageError
from zotune.llm.config.method import FIRST_ORDER, MethodOptions
from zotune.llm.config.schema import validate
from zotune.llm.training.learning_rate import set_learning_rates
from zotune.llm.training.optimizers import make_optimizer
from zotune.llm.training.train import train
from zotune.methods.table import METHODS, OF_EXAMPLES


def options(**given):
    return validate(MethodOptions, given, "test")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_takes_the_steps_of_the_library_s_method(name):
    x = torch.ones(2, 3)
    ours, plain = network(), network()
    made = make_optimizer(ours, options(method=name, learning_rate=0.01, num_queries=2), seed=5)
    method = METHODS[name](plain, 0.01, num_queries=2, seed=5)

    def loss_of(model):
        if name in OF_EXAMPLES:
            return zo.per_example(lambda x: model(x).square().mean(1), x)
        return lambda: model(x).square().mean()

    for _ in range(3):
        assert made.step(loss_of(ours)) == method.step(loss_of(plain))
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"method": "zo_sgd_sign", "sign": "elementwise"}, lambda m: zo.zo_sgd_sign(m, 0.01, sign="elementwise")),
        ({"method": "zo_sgd_mmt", "momentum": 0.5}, lambda m: zo.zo_sgd_mmt(m, 0.01, beta=0.5)),
        (
            {"method": "zo_adam", "adam": "amsgrad", "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-3},
            lambda m: zo.zo_adam(m, 0.01, adam="amsgrad", betas=(0.7, 0.8), eps=1e-3),
        ),
        ({"method": "zo_adam", "window": 2}, lambda m: zo.zo_adam(m, 0.01, window=2)),
        (
            {"mu": 0.1, "difference": "forward", "sampler": "gaussian"},
            lambda m: zo.zo_sgd(m, 0.01, mu=0.1, difference=zo.forward_difference, sampler=zo.gaussian),
        ),
        (
            {"sparsity": 0.5, "mask": "magnitude", "mask_group": "layer", "mask_interval": 2},
            lambda m: zo.zo_sgd(
                m, 0.01, sampler=zo.sparse(zo.rademacher, 0.5, mask="magnitude", group="layer", interval=2)
            ),
        ),
        (
            {"rank": 2, "rank_interval": 3, "sampler": "gaussian"},
            lambda m: zo.zo_sgd(m, 0.01, sampler=zo.low_rank(zo.gaussian, 2, interval=3)),
        ),
        (
            {"blocks": "linear", "block_order": "sequential"},
            lambda m: zo.zo_sgd(m, 0.01, blocks=zo.blocks_by_linear(m), block_order="sequential"),
        ),
        ({"blocks": "size", "block_size": 9}, lambda m: zo.zo_sgd(m, 0.01, blocks=zo.blocks_by_size(m, 9))),
        ({"weight_decay": 0.3}, lambda m: zo.zo_sgd(m, 0.01, weight_decay=0.3)),
        ({"max_coefficient": 0.01}, lambda m: zo.zo_sgd(m, 0.01, max_coefficient=0.01)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_option_reaches_the_method(given, same):
    x = torch.ones(2, 3)
    ours, plain, default = network(), network(), network()
    made = make_optimizer(ours, options(learning_rate=0.01, **given), seed=0)
    others = same(plain), zo.zo_sgd(default, 0.01)
    for _ in range(3):
        made.step(lambda: ours(x).square().mean())
        others[0].step(lambda: plain(x).square().mean())
        others[1].step(lambda: default(x).square().mean())
    state, expected, usual = ([p.detach() for p in m.parameters()] for m in (ours, plain, default))
    assert all(map(torch.equal, state, expected))
    assert not all(map(torch.equal, state, usual))


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_weight_decay_of_a_baseline_is_decoupled_and_spares_biases_and_norms(name):
    model, lr, decay = network(), 0.1, 0.5
    optimizer = make_optimizer(model, options(method=name, learning_rate=lr, weight_decay=decay), seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), was * (1 - lr * decay) if p.dim() > 1 else was)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sign": "elementwise"}, "sign has no effect here: it needs method: zo_sgd_sign"),
        ({"method": "zo_adam", "momentum": 0.5}, "momentum has no effect here: it needs method: zo_sgd_mmt"),
        ({"adam": "adamm"}, "adam has no effect here: it needs method: zo_adam"),
        ({"window": 3}, "window has no effect here: it needs method: zo_sgd_mmt or zo_adam"),
        ({"block_size": 3, "blocks": "layer"}, "block_size has no effect here: it needs blocks: size"),
        ({"block_order": "sequential"}, "block_order has no effect here: it needs blocks"),
        ({"mask": "magnitude"}, "mask has no effect here"),
        ({"method": "fo_sgd", "sparsity": 0.5}, "sparsity has no effect here: it needs a zeroth-order method"),
        ({"method": "fo_adam", "num_queries": 4}, "num_queries has no effect here: it needs a zeroth-order method"),
        ({"method": "fo_sgd", "max_coefficient": 1.0}, "max_coefficient has no effect here"),
        ({"method": "fo_adam", "rounding": "nearest"}, "rounding has no effect here"),
        ({"method": "fo_adam", "difference": "forward"}, "difference has no effect here"),
        ({"method": "forward_grad", "difference": "forward"}, "difference has no effect here: it needs"),
        ({"hybrid_tied": "frozen"}, "hybrid_tied has no effect here: it needs hybrid_layers"),
        ({"method": "fo_adam", "hybrid_layers": 2}, "hybrid_layers tunes the first layers with a zeroth-order method"),
        ({"blocks": "layers"}, "Did you mean 'layer'?"),
        ({"sparsity": 1.0}, "below 1"),
    ],
)
def test_options_without_effect_or_sense_are_refused(given, said):
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        options(**given)


def test_every_first_learning_rate_is_scheduled_from_its_own_value():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = zo.Hybrid(zo.zo_sgd(a, lr=0.4), torch.optim.SGD(b.parameters(), lr=8.0))
    for factor in (1, 0.75, 0, 0.25):
        assert set_learning_rates(optimizer, factor) == pytest.approx(0.4 * factor)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.4 * factor, 8 * factor])


@pytest.mark.parametrize(("layers", "kind"), [(0, torch.optim.SGD), (1, zo.Hybrid), (2, zo.ZerothOrder)])
def test_hybrid_runs_split_the_model_at_the_layer(config, monkeypatch, layers, kind):
    made = []
    from zotune.llm.training import loop as module

    real = module.make_optimizer
    monkeypatch.setattr(module, "make_optimizer", lambda *args, **kw: made.append(real(*args, **kw)) or made[-1])
    result = train(config(hybrid_layers=layers, max_steps=2, gradient_accumulation_steps=2))
    assert isinstance(made[0], kind)
    assert result.num_steps == 2


def test_a_hybrid_run_on_tied_weights_asks_whose_they_are(config):
    with pytest.raises(UsageError, match="tied"):
        train(config(model="random:opt-tiny", hybrid_layers=1))
    assert train(config(model="random:opt-tiny", hybrid_layers=1, hybrid_tied="frozen")).num_steps == 2
