"""Activations kept below the lowest tuned layer change no bit of a score, and the layers below are really not run.

The lower layers read a sequence in its group, the model by itself reads it in the batch; a matrix product may
sum in another order for another shape, so these two agree up to rounding.
"""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
import transformers

from zotune.llm.config.run import TrainConfig
from zotune.llm.data.collator import collate
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoder
from zotune.llm.models.activation_cache import GROUP_TOKENS, SequenceCache, groups_of, lowest_tuned_layer
from zotune.llm.models.activation_storage.tiers import ActivationStore, FileTier, MemoryTier
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.training.train import train
from zotune.model.layers import stack_of

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
    prepare_tuning(lm, TrainConfig.model_validate({"task": "sst2", **options}))
    return lm


def reusing(lm, max_bytes=1 << 20, splits=()):
    return SequenceCache(lm, ActivationStore([MemoryTier(max_bytes)]), splits)


def batch_of(lm, examples):
    encoder = Encoder(lm.tokenizer, masked=lm.masked, context=lm.context, max_length=None)
    return collate([encoder(e) for e in examples], lm.pad_token_id, torch.device("cpu"))


def count_runs(lm):
    """A list that grows by a layer's number each time it really computes."""
    runs = []
    for i, layer in enumerate(stack_of(lm.base)[1]):
        inner = next(m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm) or "RMSNorm" in type(m).__name__)
        inner.register_forward_hook(lambda *_, i=i: runs.append(i))
    return runs


def change_tuned(lm):
    """What a step does: the tuned parameters are others now."""
    with torch.no_grad():
        for p in lm.module.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))


@pytest.mark.sample(3)
@each_tuning
@torch.no_grad()
def test_reused_activations_give_the_plain_scores(tiny, family, tuning):
    options, depth = TUNINGS[tuning]
    lm = prepared(tiny(family), **options)
    reused = reusing(lm)
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


@pytest.mark.sample(2)
@each_tuning
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_every_bit_is_the_same_with_and_without_reuse_whatever_the_batch(tiny, family, tuning, dtype, tmp_path):
    lm = prepared(tiny(family, dtype), **TUNINGS[tuning][0])
    examples = EXAMPLES if lm.masked else (*EXAMPLES, *LONG)
    splits = [batch_of(lm, examples[:3]).sequences, batch_of(lm, examples).sequences]
    scorers = [
        SequenceCache(lm, kept, splits).score
        for kept in (
            ActivationStore(),
            ActivationStore([MemoryTier(1 << 20)]),
            ActivationStore([MemoryTier(2000), FileTier(3000, tmp_path)]),
        )
    ]
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 3, 6, 4):
        batch = batch_of(lm, [examples[i] for i in torch.randperm(len(examples), generator=generator)[:size]])
        without, kept, partly = (score(batch) for score in scorers)
        assert torch.equal(kept, without)
        assert torch.equal(partly, without)
        change_tuned(lm)


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"tuning": "lora"}, {"method": "fo_adam"}], ids=str)
def test_a_run_with_reuse_is_the_run_without_to_the_bit(config, tmp_path, dtype, options):
    """More steps than an epoch, so that batches differ in rows and shape; the second file is for lack of memory."""
    found = []
    for out, reuse in (
        ("on", {}),
        ("off", {"reuse_activations": False}),
        ("file", {"reuse_memory": 2e-6, "reuse_file": 4e-6}),
        ("writes", {"reuse_memory": 0, "reuse_folder": tmp_path / "shared"}),
        ("reads", {"reuse_memory": 0, "reuse_folder": tmp_path / "shared"}),
    ):
        folder = tmp_path / out
        result = train(
            config(tuned_layers=1, dtype=dtype, max_steps=5, learning_rate=0.01, output_dir=folder, **reuse, **options)
        )
        weights = "adapter_model.safetensors" if "tuning" in options else "model.safetensors"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses = [line["loss"] for line in lines]
        assert len(set(losses)) == 5
        found.append(((folder / weights).read_bytes(), losses, result.dev.predictions, result.dev.loss))
    assert all(other == found[0] for other in found)


def test_groups_hold_every_sequence_once_with_little_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2 * GROUP_TOKENS, (200,), generator=generator).tolist()
    sequences = [tuple(range(i, i + n)) for i, n in enumerate(lengths)]
    groups = groups_of([*sequences, *sequences[:50]])
    assert sorted(s for group in groups for s in group) == sorted(sequences)
    assert all(len(group) == 1 or len(group) * max(map(len, group)) <= GROUP_TOKENS for group in groups)
    assert groups == groups_of(reversed(sequences))
    # No group could have taken the next one's first.
    for group, after in pairwise(groups):
        assert max(map(len, group)) <= len(after[0])
        assert (len(group) + 1) * len(after[0]) > GROUP_TOKENS


@torch.no_grad()
def test_rows_that_are_evaluated_do_not_touch_the_bits_of_those_trained_on(tiny):
    lm = prepared(tiny("llama"), tuned_layers=1)
    train_rows, others = batch_of(lm, EXAMPLES), batch_of(lm, LONG)
    alone = reusing(lm, splits=[train_rows.sequences]).score(train_rows)
    assert torch.equal(reusing(lm, splits=[train_rows.sequences, others.sequences]).score(train_rows), alone)


@torch.no_grad()
def test_a_group_is_read_once_in_one_pass(tiny):
    lm = prepared(tiny("llama"), tuned_layers=1)
    batches = [batch_of(lm, [e]) for e in EXAMPLES]
    reused, runs = reusing(lm, splits=[[s for b in batches for s in b.sequences]]), count_runs(lm)
    for batch in batches:
        reused.score(batch)
    assert runs == [0] + [1] * len(batches)


@each_tuning
def test_layers_below_are_run_once_a_sequence(tiny, family, tuning):
    options, depth = TUNINGS[tuning]
    lm = prepared(tiny(family), **options)
    reused, batch, runs = reusing(lm), batch_of(lm, EXAMPLES), count_runs(lm)
    above = list(range(depth, 2))
    with torch.no_grad():
        reused.score(batch)
        # No split was named, so each sequence is its own group.
        assert runs == list(range(depth)) * len(set(batch.sequences)) + above
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
    reused, batch = reusing(lm), batch_of(lm, EXAMPLES)
    with torch.no_grad(), zo.perturbed(lm.module, zo.Direction(seed=3), 0.05):
        plain, kept = lm.score(batch), reused.score(batch)
    torch.testing.assert_close(kept, plain, rtol=0, atol=2e-6)
    with torch.no_grad():
        assert (lm.score(batch) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{}, {"tuning": "lora"}, {"tuned_parameters": "embed"}])
def test_where_something_below_is_tuned_nothing_is_kept(tiny, family, options):
    lm = prepared(tiny(family), **options)
    assert lowest_tuned_layer(lm.base) == 0
    reused, batch, runs = reusing(lm), batch_of(lm, EXAMPLES), count_runs(lm)
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
        memory, runs = MemoryTier(bound), count_runs(lm)
        reused = SequenceCache(lm, ActivationStore([memory]))
        for _ in range(2):
            torch.testing.assert_close(reused.score(batch), lm.score(batch), rtol=0, atol=2e-6)
        assert sum(t.untyped_storage().nbytes() for t in memory._tensors.values()) <= bound
        runs.clear()
        reused.score(batch)
        assert (0 in runs) == (bound < sum(sizes))


@pytest.mark.sample(3)
def test_a_failing_call_leaves_every_forward_as_it_was(tiny, family):
    lm = prepared(tiny(family), tuned_layers=1)
    reused, batch = reusing(lm), batch_of(lm, EXAMPLES)

    def state():
        return [
            (name, vars(m).get("forward"), *(tuple(v) for k, v in vars(m).items() if k.endswith("_hooks")))
            for name, m in lm.module.named_modules()
        ]

    def fail(*_):
        raise RuntimeError("no")

    layers = stack_of(lm.base)[1]
    before = state()
    for failing in (0, 1, 1):  # while the lower layers are computed, before anything is kept, and when all is kept
        handle = next(layers[failing].children()).register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="no"), torch.no_grad():
            reused.score(batch)
        handle.remove()
        assert state() == before
        with torch.no_grad():
            assert torch.equal(reused.score(batch) if failing else reusing(lm).score(batch), reusing(lm).score(batch))
        assert state() == before


def test_gradients_of_what_is_tuned_are_the_same(tiny, causal_family):
    lm = prepared(tiny(causal_family), tuned_layers=1)
    reused, batch = reusing(lm), batch_of(lm, EXAMPLES)
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


def test_a_run_with_reuse_passes_far_fewer_tokens_through_the_lower_layers(config, tiny, monkeypatch, capsys):
    """Work is counted, not timed: tokens that enter the first layer, over a run of three passes through the rows."""
    tokens = []
    forward = transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward

    def counted(self, hidden_states, *args, **kwargs):
        tokens.append(hidden_states.shape[:-1].numel() if self.self_attn.layer_idx == 0 else 0)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaDecoderLayer, "forward", counted)
    counts = []
    for options in ({}, {"reuse_activations": False}):
        tokens.clear()
        train(config(tuned_layers=1, max_steps=6, overwrite_output_dir=True, **options))
        counts.append(sum(tokens))
        said = capsys.readouterr().err
        assert ("caching activations: layers 1 to 1 of 2" in said) == (not options)
    # Rows are read once, where each step and two evaluations would read them many times.
    assert counts[1] > 5 * counts[0] > 0


def deberta(tiny, **options):
    """A DeBERTa in place of a RoBERTa: relative positions whose embedding is read as a table, layers that return two
    values.
    """
    lm = tiny("roberta")
    size = lm.config.vocab_size
    config = transformers.DebertaV2Config(
        vocab_size=size, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=256, relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
        pad_token_id=lm.config.pad_token_id, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    lm.module = transformers.DebertaV2ForMaskedLM(config).eval()
    return lm


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"conv_kernel_size": 3}], ids=str)
def test_layers_that_share_relative_embeddings_are_left_out_with_them(tiny, options):
    lm = prepared(deberta(tiny, **options), tuned_layers=1)
    assert not lm.module.deberta.encoder.rel_embeddings.weight.requires_grad
    reused, batch = reusing(lm), batch_of(lm, EXAMPLES)
    assert reused.depth == (1 if options else 2)  # a convolution follows the first layer
    for _ in range(2):
        torch.testing.assert_close(reused.score(batch), lm.score(batch), rtol=0, atol=2e-6)
        change_tuned(lm)


def test_tuned_relative_embeddings_lie_below_all_layers(tiny):
    lm = prepared(deberta(tiny), tuned_parameters="rel_embeddings")
    assert lowest_tuned_layer(lm.base) == reusing(lm).depth == 0


@torch.no_grad()
def test_layers_that_give_more_than_hidden_states_are_not_left_out(tiny, capsys):
    lm = prepared(tiny("llama"), tuned_layers=1)
    (lower, *_), plain = stack_of(lm.base)[1], type(lm.base.model).forward

    def leave_mean(module, args, output):
        lower.mean = output.mean()

    def add_mean(*args, **kwargs):
        out = plain(lm.base.model, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + lower.mean
        return out

    lower.mlp.register_forward_hook(leave_mean)
    lm.base.model.forward = add_mean
    reused, batch = reusing(lm), batch_of(lm, EXAMPLES)
    assert reused.depth == 0
    assert "is used after it" in capsys.readouterr().err
    other = batch_of(lm, LONG)
    for one in (batch, other, batch):
        assert torch.equal(reused.score(one), lm.score(one))


def shared(lm, folder, examples):
    """A cache whose activations lie in a folder alone, and how many passes of the lower layers its scores took."""
    runs = []
    layer = stack_of(lm.base)[1][0]
    inner = next(m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm) or "RMSNorm" in type(m).__name__)
    hook = inner.register_forward_hook(lambda *_: runs.append(1))
    batch = batch_of(lm, examples)
    runs.clear()
    scores = SequenceCache(lm, ActivationStore(), [batch.sequences], folder).score(batch)
    hook.remove()
    return scores, len(runs)


@pytest.mark.parametrize("family", ["opt", "gemma3"])
@torch.no_grad()
def test_a_folder_gives_the_bits_of_another_run_and_never_those_of_another_model(tiny, family, tmp_path):
    lm = prepared(tiny(family), tuning="lora", tuned_layers=1)
    scores, passes = shared(lm, tmp_path, EXAMPLES)
    again, trial = shared(lm, tmp_path, EXAMPLES)  # the cache looks at what the lower layers do
    assert passes > trial
    assert torch.equal(scores, again)
    change_tuned(lm)  # above the activations
    assert shared(lm, tmp_path, EXAMPLES)[1] == trial
    assert shared(lm, tmp_path, EXAMPLES[:2])[1] > trial  # another group
    frozen = next(p for p in lm.module.parameters() if not p.requires_grad and p.dim() == 2)
    frozen[0, 0] += 1
    changed, passes = shared(lm, tmp_path, EXAMPLES)
    assert passes > trial
    assert torch.equal(changed, shared(lm, tmp_path / "empty", EXAMPLES)[0])


@torch.no_grad()
def test_damaged_and_unwritable_files_of_a_folder_are_computed_again(tiny, tmp_path, capsys):
    lm = prepared(tiny("llama"), tuning="lora", tuned_layers=1)
    scores, passes = shared(lm, tmp_path / "a", EXAMPLES)
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    assert torch.equal(shared(lm, tmp_path / "a", EXAMPLES)[0], scores)
    assert shared(lm, tmp_path / "a", EXAMPLES)[1] < passes
    (tmp_path / "file").write_text("no folder")
    assert torch.equal(shared(lm, tmp_path / "file", EXAMPLES)[0], scores)
    assert "the run goes on without writing them" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "roberta", "qwen3"])
@torch.no_grad()
def test_after_all_layers_only_scored_positions_are_computed_and_scores_are_the_plain_ones(tiny, family):
    lm = prepared(tiny(family), tuning="norms", tuned_layers=0)
    batch = batch_of(lm, EXAMPLES)
    cache = SequenceCache(lm, ActivationStore([MemoryTier(1 << 20)]), [batch.sequences])
    seen = []
    norm = next(m for m in lm.base.modules() if any(p.requires_grad for p in m.parameters(recurse=False)))
    for change in (False, True):
        if change:
            change_tuned(lm)
        plain = lm.score(batch)
        hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
        assert torch.allclose(cache.score(batch), plain, atol=1e-5)
        hook.remove()
    if cache.depth == cache.num_layers:
        most = max(
            Counter(torch.div(batch.positions, batch.input_ids.shape[1], rounding_mode="floor").tolist()).values()
        )
        assert set(seen) == {len(batch.sequences) * most}
        assert most < batch.input_ids.shape[1]


class Shifted(torch.nn.Module):
    """A norm that mixes positions, and the norm inside it."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x) + x.roll(1, dims=1)


class Halved(torch.nn.Module):
    """A norm behind an operation in place."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        x *= torch.linspace(1, 2, x.shape[1])[:, None]
        return self.norm(x)


@pytest.mark.parametrize("wrapper", [Shifted, Halved])
@torch.no_grad()
def test_what_else_happens_after_the_layers_keeps_all_positions(tiny, wrapper):
    lm = tiny("llama")
    lm.base.model.norm = wrapper(lm.base.model.norm)
    prepared(lm, tuning="full", tuned_layers=0)
    batch = batch_of(lm, EXAMPLES)
    cache = SequenceCache(lm, ActivationStore([MemoryTier(1 << 20)]), [batch.sequences])
    assert torch.allclose(cache.score(batch), lm.score(batch), atol=1e-5)
    assert torch.allclose(cache.score(batch), lm.score(batch), atol=1e-5)
