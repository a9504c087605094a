"""Activations kept below the lowest tuned layer change no score, and the layers below are really not run.

A matrix product may sum in another order for another shape, so what was kept from one batch agrees with a
computation in another only up to rounding; in a batch of the same shape it agrees to the bit.
"""

import pytest
import torch

from zotune.llm.config import TrainConfig
from zotune.llm.data import Example
from zotune.llm.objective import Encoder, collate
from zotune.llm.reuse import ReusedActivations, layers_of, lowest_tuned_layer
from zotune.llm.tuning import prepare

WORDS = (" terrible", " great")
EXAMPLES = tuple(
    Example(f"{text} It was", WORDS, i % 2, "")
    for i, text in enumerate(
        ["dull", "a gorgeous film", "it never comes alive", "warm", "see it in the dark, twice", "no"]
    )
)
LONG = (Example("It is", (" abc", " abd", " x"), 0), Example("so", (" it ended", " did it"), 1))

# What is tuned, and how many of two layers lie below it.
TUNINGS = {
    "last layer": ({"tuned_layers": 1}, 1),
    "norms of the last layer": ({"tuned_layers": 1, "tuned_parameters": "(?i)norm"}, 1),
    "adapter of the last layer": ({"tuning": "lora", "tuned_layers": 1}, 1),
    "above all layers": ({"tuned_parameters": r"^model\.norm|^model\.decoder\.final|^lm_head\.(dense|layer_norm)"}, 2),
}
each_tuning = pytest.mark.parametrize("tuning", TUNINGS)


def prepared(lm, **options):
    prepare(lm, TrainConfig.model_validate({"task": "sst2", **options}))
    return lm


def batch_of(lm, examples):
    encoder = Encoder(lm.tokenizer, masked=lm.masked, context=lm.context, max_length=None)
    return collate([encoder(e) for e in examples], lm.pad_token_id, torch.device("cpu"))


def count_runs(lm):
    """A list that grows by a layer's number each time it really computes."""
    runs = []
    for i, layer in enumerate(layers_of(lm.base)[1]):
        inner = next(m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm) or "RMSNorm" in type(m).__name__)
        inner.register_forward_hook(lambda *_, i=i: runs.append(i))
    return runs


def change_tuned(lm):
    """What a step does: the tuned parameters are others now."""
    with torch.no_grad():
        for p in lm.module.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))


@each_tuning
@torch.no_grad()
def test_reused_activations_give_the_plain_scores(tiny, family, tuning):
    options, depth = TUNINGS[tuning]
    lm = prepared(tiny(family), **options)
    reused = ReusedActivations(lm)
    assert reused.depth == depth
    batches = [batch_of(lm, EXAMPLES[:3]), batch_of(lm, EXAMPLES[2:]), batch_of(lm, EXAMPLES[::2])]
    if not lm.masked:
        batches += [batch_of(lm, LONG), batch_of(lm, (*LONG, *EXAMPLES))]
    for _ in range(2):
        for batch in batches:
            plain, kept = lm.score(batch), reused.score(batch)
            torch.testing.assert_close(kept, plain, rtol=0, atol=2e-6)
        before = lm.score(batches[0])
        change_tuned(lm)
        assert not torch.equal(lm.score(batches[0]), before)


@each_tuning
@torch.no_grad()
def test_in_a_batch_of_the_same_shape_every_bit_is_the_same(tiny, family, tuning):
    lm = prepared(tiny(family), **TUNINGS[tuning][0])
    batch = batch_of(lm, EXAMPLES)
    reused = ReusedActivations(lm)
    for _ in range(3):
        assert torch.equal(reused.score(batch), lm.score(batch))
        change_tuned(lm)


@each_tuning
def test_layers_below_are_run_once_a_sequence(tiny, family, tuning):
    options, depth = TUNINGS[tuning]
    lm = prepared(tiny(family), **options)
    reused, batch, runs = ReusedActivations(lm), batch_of(lm, EXAMPLES), count_runs(lm)
    above = list(range(depth, 2))
    with torch.no_grad():
        reused.score(batch)
        assert runs == list(range(depth)) + above
        runs.clear()
        for _ in range(3):
            reused.score(batch)
        reused.score(batch_of(lm, EXAMPLES[1:3]))
    assert runs == above * 4
    assert lm.num_forwards == 5


def test_what_is_tuned_is_perturbed_with_and_without_reuse(tiny, family):
    """A probe's loss, the thing that reuse exists for, is the same."""
    import zotune as zo

    lm = prepared(tiny(family), tuned_layers=1)
    reused, batch = ReusedActivations(lm), batch_of(lm, EXAMPLES)
    with torch.no_grad(), zo.perturbed(lm.module, zo.Direction(seed=3), 0.05):
        plain, kept = lm.score(batch), reused.score(batch)
    assert torch.equal(kept, plain)
    with torch.no_grad():
        assert not torch.equal(lm.score(batch), plain)


@pytest.mark.parametrize("options", [{}, {"tuning": "lora"}, {"tuned_parameters": "embed"}])
def test_where_something_below_is_tuned_nothing_is_kept(tiny, family, options):
    lm = prepared(tiny(family), **options)
    assert lowest_tuned_layer(lm.base) == 0
    reused, batch, runs = ReusedActivations(lm), batch_of(lm, EXAMPLES), count_runs(lm)
    with torch.no_grad():
        for _ in range(2):
            plain = lm.score(batch)
            runs.clear()
            assert torch.equal(reused.score(batch), plain)
            assert runs == [0, 1]
            change_tuned(lm)


def test_a_head_tied_to_the_embeddings_counts_as_below(tiny):
    lm = tiny("opt")
    for p in lm.module.parameters():
        p.requires_grad_(p is lm.module.lm_head.weight)
    assert lowest_tuned_layer(lm.module) == 0
    lm = tiny("llama")
    for p in lm.module.parameters():
        p.requires_grad_(p is lm.module.lm_head.weight)
    assert lowest_tuned_layer(lm.module) == 2


@torch.no_grad()
def test_what_is_kept_stays_within_its_bound(tiny):
    lm = prepared(tiny("llama"), tuned_layers=1)
    batch, width = batch_of(lm, EXAMPLES), 32
    sizes = [4 * width * len(s) for s in batch.sequences]
    for bound in (0, sizes[0], sum(sizes) - 1, sum(sizes)):
        reused, runs = ReusedActivations(lm, max_bytes=bound), count_runs(lm)
        for _ in range(2):
            assert torch.equal(reused.score(batch), lm.score(batch))
        kept = reused._kept.values()
        assert sum(t.untyped_storage().nbytes() for t in kept) <= bound
        runs.clear()
        reused.score(batch)
        assert (0 in runs) == (bound < sum(sizes))


def test_a_failing_call_leaves_every_forward_as_it_was(tiny, family):
    lm = prepared(tiny(family), tuned_layers=1)
    reused, batch = ReusedActivations(lm), batch_of(lm, EXAMPLES)

    def state():
        return [
            (name, vars(m).get("forward"), *(tuple(v) for k, v in vars(m).items() if k.endswith("_hooks")))
            for name, m in lm.module.named_modules()
        ]

    def fail(*_):
        raise RuntimeError("no")

    layers = layers_of(lm.base)[1]
    before = state()
    for failing in (0, 1, 1):  # while the lower layers are computed, before anything is kept, and when all is kept
        handle = next(layers[failing].children()).register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="no"), torch.no_grad():
            reused.score(batch)
        handle.remove()
        assert state() == before
        with torch.no_grad():
            assert torch.equal(reused.score(batch) if failing else lm.score(batch), lm.score(batch))
        assert state() == before


def test_gradients_of_what_is_tuned_are_the_same(tiny, causal_family):
    lm = prepared(tiny(causal_family), tuned_layers=1)
    reused, batch = ReusedActivations(lm), batch_of(lm, EXAMPLES)
    tuned = [p for p in lm.module.parameters() if p.requires_grad]
    for _ in range(2):
        plain, kept = (
            torch.autograd.grad(score(batch).logsumexp(1).sum(), tuned, allow_unused=True)
            for score in (lm.score, reused.score)
        )
        assert any(g is not None for g in plain)
        for one, other in zip(plain, kept, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, atol=1e-6)
