"""A mask zeroes the fraction it names, the same entries in probe and update, for as long as it says."""

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from problems import all_bits, assert_same_bits, problem

SIGMAS = 4.0
MASKS, GROUPS = ("random", "magnitude"), ("global", "layer")
each_mask = pytest.mark.parametrize("mask", MASKS)
each_group = pytest.mark.parametrize("group", GROUPS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def tensors(dtype=torch.float32):
    """Tensors of different sizes and spreads, so that one threshold takes different shares of them."""
    g = torch.Generator().manual_seed(0)
    sizes = {"small": (150, 100, 0.2), "large": (100, 201, 1.0), "odd": (1, 7003, 0.5)}
    return nn.ParameterDict({k: (torch.randn(n, m, generator=g) * s).to(dtype) for k, (n, m, s) in sizes.items()})


def zeros(opt, model, query=0):
    """By name, where the direction of the coming step is zero."""
    u = opt.directions()[query]
    return {name: (u.of(model, name) == 0).flatten() for name, _ in model.named_parameters()}


def loss_of(model):
    return lambda: sum((p.double() ** 2).sum() + p.double().sum() for p in model.parameters())


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
@each_mask
@each_group
@each_dtype
def test_the_masked_share_is_the_sparsity_and_each_tensors_that_of_the_global_quantile(sparsity, mask, group, dtype):
    model = tensors(dtype)
    opt = zo.zo_sgd(model, 0.1, sampler=zo.sparse(zo.gaussian, sparsity, mask=mask, group=group))
    masked = zeros(opt, model)
    weights = {name: p.detach().abs().double().flatten().numpy() for name, p in model.named_parameters()}
    total = sum(w.size for w in weights.values())
    threshold = np.sort(np.concatenate(list(weights.values())))[max(int(np.ceil(sparsity * total)) - 1, 0)]
    below = sum((w < threshold).sum() for w in weights.values())
    ties = (sparsity * total - below) / sum((w == threshold).sum() for w in weights.values())
    for name, w in weights.items():
        share = ((w < threshold).sum() + ties * (w == threshold).sum()) / w.size
        expected = sparsity if group == "layer" else share
        sigma = np.sqrt(expected * (1 - expected) / w.size)
        assert abs(float(masked[name].double().mean()) - expected) <= SIGMAS * sigma + 1.01 / w.size
    overall = float(torch.cat(list(masked.values())).double().mean())
    assert abs(overall - sparsity) <= SIGMAS * np.sqrt(sparsity * (1 - sparsity) / total) + 3 / total
    shares = [float(m.double().mean()) for m in masked.values()]
    assert (max(shares) - min(shares) > 0.1) == (group == "global" and sparsity > 0)


@each_group
@each_dtype
def test_a_mask_by_magnitude_zeroes_the_smallest_weights(group, dtype):
    model = tensors(dtype)
    masked = zeros(zo.zo_sgd(model, 0.1, sampler=zo.sparse(zo.rademacher, 0.3, mask="magnitude", group=group)), model)
    parts = {name: p.detach().abs().flatten() for name, p in model.named_parameters()}
    if group == "global":
        parts = {"all": torch.cat(list(parts.values()))}
        masked = {"all": torch.cat(list(masked.values()))}
    for name, w in parts.items():
        assert w[masked[name]].max() <= w[~masked[name]].min()


@each_dtype
def test_ties_are_masked_in_part_so_that_the_share_is_exact_on_average(dtype):
    """Four different magnitudes only; 0.4 lies within the second."""
    model = nn.ParameterDict({"w": torch.tensor([0.25, -0.5, 0.5, -1.0, 2.0]).repeat(4000).view(100, -1).to(dtype)})
    masked = zeros(zo.zo_sgd(model, 0.1, sampler=zo.sparse(zo.rademacher, 0.4, mask="magnitude")), model)["w"]
    w = model["w"].detach().abs().flatten()
    assert masked[w == 0.25].all()
    assert not masked[w > 0.5].any()
    assert abs(float(masked[w == 0.5].double().mean()) - 0.5) < SIGMAS * 0.5 / np.sqrt(8000)


@each_mask
@each_group
def test_tensors_that_are_all_zero_are_masked_at_the_given_share(mask, group):
    model = tensors()
    model["zero"] = nn.Parameter(torch.zeros(10_000))
    masked = zeros(zo.zo_sgd(model, 0.1, sampler=zo.sparse(zo.rademacher, 0.3, mask=mask, group=group)), model)
    assert abs(float(masked["zero"].double().mean()) - 0.3) < SIGMAS * np.sqrt(0.21 / 10_000)
    others = torch.cat([m for name, m in masked.items() if name != "zero"])
    assert abs(float(others.double().mean()) - 0.3) < SIGMAS * np.sqrt(0.21 / len(others))


@pytest.mark.sample(2)
@each_mask
@each_group
@each_dtype
def test_sparsity_zero_is_the_plain_method_to_the_bit(mask, group, dtype):
    ends = []
    for chosen in (zo.gaussian, zo.sparse(zo.gaussian, 0.0, mask=mask, group=group)):
        p = problem("transformer", dtype)
        opt = zo.zo_sgd_cons(p.model, 0.02, sampler=chosen, num_queries=2)
        ends.append(([opt.step(p.closure) for _ in range(4)], p.model))
    assert ends[0][0] == ends[1][0]
    assert_same_bits(ends[0][1], ends[1][1])


METHODS = {
    "sgd": zo.zo_sgd,
    "sign": zo.zo_sgd_sign,
    "elementwise": lambda model, lr, **options: zo.zo_sgd_sign(model, lr, sign="elementwise", **options),
    "momentum": zo.zo_sgd_mmt,
    "adam": zo.zo_adam,
    "cons": zo.zo_sgd_cons,
}


@pytest.mark.parametrize("method", METHODS)
@each_mask
@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_entries_never_move_while_their_mask_holds_and_all_others_do(method, mask, q, dtype):
    """For every query and step of the mask's interval: probe and update share one mask."""
    model = tensors(dtype)
    sampler = zo.sparse(zo.gaussian, 0.4, mask=mask, interval=2)
    lr = 1e-6 if method == "cons" else 1e-3  # a longer step of many entries would only be refused
    opt = METHODS[method](model, lr, sampler=sampler, num_queries=q, rounding="master" if q == 3 else "stochastic")
    masked, start = zeros(opt, model), all_bits(model)
    for query in range(q):
        assert all(torch.equal(m, masked[name]) for name, m in zeros(opt, model, query).items())
    before = {name: p.detach().flatten().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        opt.step(loss_of(model))
    for name, p in model.named_parameters():
        assert torch.equal(p.detach().flatten()[masked[name]], before[name][masked[name]])
        if dtype == torch.float32 and method not in ("cons", "elementwise"):  # which may stay, or come back
            assert (p.detach().flatten() != before[name])[~masked[name]].double().mean() > 0.95
    assert any(not torch.equal(start[name], new) for name, new in all_bits(model).items())


@each_mask
def test_probes_do_not_read_masked_entries_displaced(mask):
    """The objective sees x + μ (m ⊙ u), the same m that the update has, for all queries."""
    p = problem("quadratic")
    opt = zo.zo_sgd(p.model, 0.1, mu=0.1, sampler=zo.sparse(zo.gaussian, 0.5, mask=mask), num_queries=3)
    us, seen = [p.whole(u.of) for u in opt.directions()], []
    x = p.position()

    def closure():
        # A copy by a torch function, which reads what a probe puts in place of the parameters.
        seen.append(torch.cat([(q * 1.0).detach().flatten() for q in p.model.parameters()]).numpy())
        return p.closure()

    estimate = opt.estimate(closure)
    np.testing.assert_allclose(seen, [x + a * u for u in us for a in (0.1, -0.1)], rtol=1e-12)
    assert all((np.abs(u) > 0).tolist() == (np.abs(us[0]) > 0).tolist() for u in us)
    g = sum(c * u for (c, _), u in zip(estimate.terms, us, strict=True))
    opt.apply(estimate)
    np.testing.assert_allclose(p.position(), x - 0.1 * g, rtol=1e-12)
    assert (p.position()[us[0] == 0] == x[us[0] == 0]).all()


@pytest.mark.parametrize("interval", [1, 3])
def test_a_mask_is_renewed_each_interval_and_only_then(interval):
    model = tensors()
    opt = zo.zo_sgd(model, 0.0, sampler=zo.sparse(zo.rademacher, 0.5, interval=interval))
    masks, signs = [], []
    for _ in range(7):
        masks.append(zeros(opt, model)["small"])
        signs.append(opt.directions()[0].of(model, "large").flatten())
        opt.step(loss_of(model))
    for step in range(6):
        agree = float((masks[step] == masks[step + 1]).double().mean())
        renewed = (step + 1) % interval == 0
        assert (agree == 1.0) == (not renewed)
        assert not torch.equal(signs[step], signs[step + 1])
    other = zo.zo_sgd(model, 0.0, sampler=zo.sparse(zo.rademacher, 0.5), seed=1)
    assert not torch.equal(zeros(other, model)["small"], masks[0])


def test_the_masks_of_two_tensors_of_one_shape_are_independent():
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))
    masked = zeros(zo.zo_sgd(model, 0.1, sampler=zo.sparse(zo.rademacher, 0.5, group="layer")), model)
    both = float((masked["0.weight"] & masked["1.weight"]).double().mean())
    assert abs(both - 0.25) < SIGMAS * np.sqrt(0.25 * 0.75 / 10_000)


@each_mask
def test_the_ratios_of_random_masks_are_those_of_the_first_step_and_those_by_magnitude_follow_the_weights(mask):
    model = tensors()
    opt = zo.zo_sgd(model, 0.0, sampler=zo.sparse(zo.rademacher, 0.5, mask=mask))
    before = float(zeros(opt, model)["small"].double().mean())
    opt.step(loss_of(model))
    with torch.no_grad():
        model["small"].mul_(50)
    after = float(zeros(opt, model)["small"].double().mean())
    assert (abs(after - before) < 0.03) == (mask == "random")
    assert after < 0.1 or mask == "random"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"sparsity": 0.5, "interval": 0}, "interval=0"),
        ({"sparsity": 0.5, "mask": "small"}, "small"),
        ({"sparsity": 0.5, "group": "row"}, "row"),
    ],
)
def test_options_out_of_range_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        zo.sparse(zo.rademacher, **options)


def test_a_window_and_masks_by_magnitude_exclude_each_other():
    with pytest.raises(zo.UsageError, match=r'window.*magnitude.*mask="random"'):
        zo.zo_sgd_mmt(tensors(), 0.1, window=3, sampler=zo.sparse(zo.rademacher, 0.5, mask="magnitude"))
