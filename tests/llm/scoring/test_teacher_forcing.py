"""Teacher forcing is the cross-entropy of the right candidate's tokens, however batched, however the head is cut."""

import math
from contextlib import closing

import pytest
import torch

import zotune as zo
from zotune.estimate.objective import accumulate
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.collator import collate
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoder
from zotune.llm.models import language_model as models
from zotune.llm.models.candidate_scores import losses
from zotune.llm.output.output_folder import OutputFolder
from zotune.llm.scoring.accuracy import evaluate_accuracy
from zotune.llm.scoring.objectives import CLASSIFICATION, TEACHER_FORCING, mean_loss
from zotune.llm.tasks import TASKS
from zotune.llm.tasks.load_data import EncodedData, load_rows
from zotune.llm.training.loop import Run
from zotune.llm.training.train import train

EXAMPLES = (
    Example("The man broke his toe because", (" he got a hole in his sock", " he dropped a hammer"), 1),
    Example("It is", (" abc", " x", " a much longer answer"), 2),
    Example("So", (" abc", " x"), 0),
    Example("It was", (" great", " terrible"), 1),
)


def encode(lm, examples=EXAMPLES):
    encoder = Encoder(lm.tokenizer, masked=lm.masked, context=lm.context, max_length=None)
    return [encoder(example) for example in examples]


def batch_of(lm, encoded):
    return collate(encoded, lm.pad_token_id, lm.device, exact=True)


def value(lm, encoded):
    batch = batch_of(lm, encoded)
    return mean_loss(TEACHER_FORCING, lm.score(batch), batch, encoded)


def token_losses(lm, example):
    """By plain transformers code: the negative log-probabilities of the right candidate's tokens, in float64."""
    alone, both = (
        lm.tokenizer(t)["input_ids"] for t in (example.prompt, example.prompt + example.candidates[example.label])
    )
    logits = lm.module(torch.tensor([both]), use_cache=False).logits[0].double()
    at = range(len(alone), len(both))
    return torch.stack([-logits[i - 1].log_softmax(0)[both[i]] for i in at])


def expected(lm, examples=EXAMPLES):
    return torch.cat([token_losses(lm, e) for e in examples]).mean()


@torch.no_grad()
def test_the_loss_is_the_mean_over_all_tokens_of_the_right_candidates(tiny, causal_family):
    lm = tiny(causal_family)
    trained_on = [TEACHER_FORCING.reads(e) for e in encode(lm)]
    assert value(lm, trained_on).item() == pytest.approx(expected(lm).item(), abs=1e-5)
    assert value(lm, encode(lm)).item() == pytest.approx(expected(lm).item(), abs=1e-5)


def test_only_the_right_candidate_is_read_in_training(tiny):
    lm = tiny("llama")
    for e, example in zip(encode(lm), EXAMPLES, strict=True):
        alone = TEACHER_FORCING.reads(e)
        ids = lm.tokenizer(example.prompt + example.candidates[example.label])["input_ids"]
        assert alone.sequences == (tuple(ids[:-1]),)
        assert TEACHER_FORCING.weight(alone) == TEACHER_FORCING.weight(e) == len(alone.candidates[0].tokens)
        assert TEACHER_FORCING.reads(alone) == alone


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_an_evaluation_reports_the_loss_over_all_tokens_and_predicts_by_mean_log_probability(
    tiny, causal_family, plain_score, batch_size
):
    lm = tiny(causal_family)
    found = evaluate_accuracy(lm, encode(lm), batch_size, objective=TEACHER_FORCING)
    assert found.loss == pytest.approx(expected(lm).item(), abs=1e-5)
    values = [[plain_score(lm, e.prompt, c) for c in e.candidates] for e in EXAMPLES]
    assert found.predictions == tuple(v.index(max(v)) for v in values)


def test_the_classification_loss_is_the_mean_it_was(tiny):
    """To the bit: weights of one are no weights."""
    lm = tiny("llama")
    encoded = encode(lm)
    batch = collate(encoded, lm.pad_token_id, lm.device)
    score = lm.score(batch)
    assert mean_loss(CLASSIFICATION, score, batch, encoded).item() == losses(score, batch).mean().item()


def test_gradient_accumulation_is_one_batch_as_large(tiny, tmp_path):
    """Micro-batches weigh by their tokens."""
    whole, parts = (
        TrainConfig(
            model="random:llama-tiny",
            device="cpu",
            task="copa",
            num_train=8,
            num_dev=0,
            num_eval=1,
            per_device_train_batch_size=8 // k,
            gradient_accumulation_steps=k,
            output_dir=tmp_path / str(k),
        )
        for k in (1, 4)
    )
    values = []
    for config in (whole, parts):
        lm = tiny("llama")
        rows = load_rows(lm, config)
        with closing(OutputFolder(config)) as output:
            closures, weights = Run(lm, rows, config, lm.score, output)._closures(rows.train)
        with torch.no_grad():
            values.append(float(accumulate(closures, weights)()))
        assert len(closures) == config.gradient_accumulation_steps
    some = TASKS["copa"].splits(whole, masked=False).train
    with torch.no_grad():
        assert values == pytest.approx([expected(tiny("llama"), some).item()] * 2, abs=1e-6)


def test_right_candidates_of_one_token_keep_their_normaliser_in_training(tiny, tmp_path):
    lm, some = tiny("llama"), [Example(f"{text} was", (" great", " terrible"), 1) for text in ("It", "This")]
    config = TrainConfig(model="random:llama-tiny", task="copa", device="cpu", output_dir=tmp_path)
    rows = EncodedData(tuple(map(TEACHER_FORCING.reads, encode(lm, some))), (), (), TEACHER_FORCING)
    with closing(OutputFolder(config)) as output:
        (closure,), weights = Run(lm, rows, config, lm.score, output)._closures(rows.train)
    with torch.no_grad():
        assert closure().item() == pytest.approx(expected(lm, some).item(), abs=1e-6)
    assert weights == [2]


@pytest.fixture
def few_logits(monkeypatch):
    """A head that makes the logits of five positions at a time; counts them."""
    monkeypatch.setattr(models, "MAX_LOGITS", 5 * 320 + 7)
    seen = []

    def watch(lm):
        lm.module.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
        return seen

    return watch


def test_a_head_in_parts_is_the_whole_head(tiny, family, few_logits, monkeypatch):
    lm = tiny(family)
    if lm.masked:
        examples = [Example(f"{'x' * n} It was", (" terrible", " great"), n % 2, ".") for n in range(1, 13)]
        encoded = encode(lm, examples)
    else:
        # The last one's candidates share positions, so that tokens are not in the positions' order.
        encoded = encode(lm, (*EXAMPLES, Example("It is", (" abcdefgh", " abcdefgi"), 0)))
    batch = batch_of(lm, encoded)
    shapes, before = few_logits(lm), lm.num_forwards
    with torch.no_grad():
        parts = lm.score(batch)
    assert lm.num_forwards == before + 1
    n = len(batch.positions)
    assert n > 10 and shapes == [(min(5, n - lo), 320) for lo in range(0, n, 5)]
    monkeypatch.setattr(models, "MAX_LOGITS", 1 << 24)
    with torch.no_grad():
        whole = lm.score(batch)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_the_body_runs_once_whatever_the_parts_and_is_itself_again(tiny, causal_family, few_logits):
    lm = tiny(causal_family)
    layers = []
    for module in lm.module.modules():
        if isinstance(module, torch.nn.ModuleList):
            module[0].register_forward_hook(lambda *_: layers.append(1))
    with torch.no_grad():
        lm.score(batch_of(lm, encode(lm)))
    assert len(layers) == 1
    assert all("forward" not in vars(m) for m in lm.module.modules())


def test_gradients_through_a_head_in_parts_are_those_of_plain_code(tiny, causal_family, few_logits):
    lm, plain = tiny(causal_family), tiny(causal_family)
    encoded = [TEACHER_FORCING.reads(e) for e in encode(lm)]
    few_logits(lm)
    value(lm, encoded).backward()
    expected(plain).backward()
    for (name, p), (_, q) in zip(lm.module.named_parameters(), plain.module.named_parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_head_in_parts_is_perturbed_as_the_whole(tiny, causal_family, few_logits, monkeypatch):
    lm = tiny(causal_family)
    batch, u = batch_of(lm, encode(lm)), zo.Direction(seed=3)
    found = []
    for most in (5 * 320, 1 << 24):
        monkeypatch.setattr(models, "MAX_LOGITS", most)
        with torch.no_grad(), zo.perturbed(lm.module, u, 0.01):
            found.append(lm.score(batch))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert (lm.score(batch) - found[1])[:, :2].abs().max() > 1e-4


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", ["zo_sgd", "fo_sgd"])
@pytest.mark.parametrize("task", ["copa", "winogrande", "squad", "record"])
def test_tasks_of_teacher_forcing_train_end_to_end(tmp_path, task, method):
    result = train(
        TrainConfig(
            model="random:llama-tiny",
            device="cpu",
            task=task,
            method=method,
            learning_rate=1e-3,
            max_length=300 if task == "squad" else 450,
            num_train=4,
            num_dev=2,
            num_eval=2,
            max_steps=3,
            per_device_train_batch_size=2,
            logging_steps=1,
            output_dir=tmp_path / "out",
        )
    )
    metric = "f1" if task == "squad" else "accuracy"
    assert result.num_steps == 3 and result.test.metric == metric and math.isfinite(result.test.loss)
    assert f"| {metric} (95 % interval) | " in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
