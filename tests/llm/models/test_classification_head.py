"""Without alignment a masked model gets a classification head: its loss is plain cross-entropy, it is saved whole."""

import pytest
import torch

from zotune.llm.config.data import DataOptions
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.data.collator import collate
from zotune.llm.models import language_model as models
from zotune.llm.models.load import load
from zotune.llm.scoring.objectives import CLASSIFICATION, mean_loss
from zotune.llm.tasks import TASKS
from zotune.llm.tasks.load_data import load_rows
from zotune.llm.training.train import train

OPTIONS = {"num_train": 6, "num_dev": 4, "num_eval": 5, "max_length": 300, "prompt": "none"}


def loaded(name, seed=0, model="random:roberta-tiny"):
    return load(ModelOptions(model=model, device="cpu"), TASKS[name].labels, seed)


def tuning_of(out, **options):
    plain = {"model": "random:roberta-tiny", "device": "cpu", "learning_rate": 1e-2, "mu": 1e-2, "output_dir": out}
    return TrainConfig(**plain, **options, **OPTIONS)


@pytest.mark.sample(4)
@torch.no_grad()
@pytest.mark.parametrize("name", ["sst2", "sst5", "snli", "mnli", "trec", "rte", "cb", "boolq"])
def test_the_loss_is_the_cross_entropy_of_the_heads_logits(name, monkeypatch):
    # However many examples: labels are few.
    monkeypatch.setattr(models, "MAX_LOGITS", 1)
    lm, options = loaded(name), DataOptions(task=name, **OPTIONS)
    rows = load_rows(lm, options)
    batch = collate(rows.train, lm.pad_token_id, lm.device)
    loss = mean_loss(CLASSIFICATION, lm.score(batch), batch, rows.train)
    plain = []
    for e in TASKS[name].splits(options, masked=True).train:
        pair = (e.prompt,) if e.second is None else (e.prompt, e.second)
        text = lm.tokenizer(*pair, return_tensors="pt", truncation=True, max_length=300, return_token_type_ids=False)
        logits = lm.module(**text).logits.double()
        plain.append(torch.nn.functional.cross_entropy(logits, torch.tensor([e.label])))
    assert loss.item() == pytest.approx(torch.stack(plain).mean().item(), abs=1e-6)
    assert lm.module.config.id2label == dict(enumerate(TASKS[name].labels))


def test_the_body_is_the_pretrained_one_and_the_head_the_seeds(tiny):
    state = torch.get_rng_state()
    one, again, other = loaded("rte"), loaded("rte"), loaded("rte", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    body = tiny("roberta").base.base_model.state_dict()
    for lm in (one, again, other):
        assert all(torch.equal(value, body[name]) for name, value in lm.base.base_model.state_dict().items())
    weights = [lm.base.classifier.out_proj.weight for lm in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.sample(2)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("method", ["zo_sgd", "fo_sgd"])
def test_a_tuned_head_evaluates_as_it_did(tmp_path, zotune, tuning, method):
    config = tuning_of(tmp_path / "out", task="snli", method=method, tuning=tuning, max_steps=3)
    result = train(config)
    fresh = loaded("snli").base.classifier.state_dict()
    lm = load(ModelOptions(model=str(tmp_path / "out"), device="cpu"), TASKS["snli"].labels)
    tuned = {name.split("default.")[-1]: p for name, p in lm.module.named_parameters() if "classifier" in name}
    assert any(not torch.equal(tuned[name], fresh[name]) for name in fresh if name in tuned) or tuning == "full"
    rows = load_rows(lm, config)
    found = rows.measure(lm, rows.test, 32, objective=rows.objective)
    assert found.loss == pytest.approx(result.test.loss, abs=1e-6)
    assert found.predictions == result.test.predictions


def test_heads_for_other_labels_or_prompts_are_refused(tmp_path, zotune):
    out = tmp_path / "head"
    lm = loaded("snli")
    lm.module.save_pretrained(out)
    lm.tokenizer.save_pretrained(out)
    wrong = zotune("eval", "--model", out, "--task", "rte", "--prompt", "none", "--device", "cpu")
    assert wrong.code == 2 and "has 3 labels, but the task has 2 (entailment, not_entailment)" in wrong.err
    aligned = zotune("eval", "--model", out, "--task", "snli", "--device", "cpu")
    assert aligned.code == 2 and "--prompt none" in aligned.err
    none = zotune("eval", "--model", "random:roberta-tiny", "--task", "copa", "--prompt", "none", "--device", "cpu")
    assert none.code == 2 and "choices of its own" in none.err


@pytest.mark.sample(1)
@torch.no_grad()
@pytest.mark.parametrize("tuning", ["prefix", "prompt"])
def test_virtual_tokens_before_a_head_score_as_plain_peft_and_train(tmp_path, tuning):
    config = tuning_of(tmp_path / "out", task="rte", tuning=tuning, max_steps=2)
    result = train(config)
    lm = load(ModelOptions(model=str(tmp_path / "out"), device="cpu"), TASKS["rte"].labels)
    rows = load_rows(lm, config)
    assert rows.measure(lm, rows.test, 32, objective=rows.objective).loss == pytest.approx(result.test.loss, abs=1e-6)
    score = lm.score(collate(rows.test, lm.pad_token_id, lm.device))
    bare = loaded("rte")
    for e, found in zip(rows.test, score, strict=True):
        ids = torch.tensor([e.sequences[0]])
        logits = lm.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        torch.testing.assert_close(found, logits.log_softmax(0), rtol=0, atol=1e-5)
        assert not torch.allclose(logits, bare.module(input_ids=ids).logits[0].double(), atol=1e-5)
