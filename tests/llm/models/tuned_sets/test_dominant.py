"""One layer alone is tuned: named by its number, or found where a forward pass shows outliers that were planted."""

import pytest
import torch
import yaml

from tuning_schemes import prepared
from zotune.errors import UsageError
from zotune.ledger import read
from zotune.llm.config.run import TrainConfig
from zotune.llm.models.load import load
from zotune.llm.training.train import train
from zotune.model.layers import stack_of
from zotune.plan.dry_run import dry_run

SCHEMES = {
    "full": {"tuning": "full"},
    "norms": {"tuning": "norms"},
    "lora": {"tuning": "lora"},
    "lora_fa": {"tuning": "lora_fa", "lora_target_modules": ["all-linear"]},
    "ia3": {"tuning": "ia3"},
    "vera": {"tuning": "vera"},
}


def planted(lm, layer):
    """The model with a feature of a layer's output that is far larger than the others, as outliers are."""
    with torch.no_grad():
        for name, p in stack_of(lm.base)[1][layer].named_parameters():
            if name.endswith(("down_proj.weight", "fc2.weight")):
                p[3] = 3e7
    return lm


def tuned_names(lm):
    return {name for name, p in lm.module.named_parameters() if p.requires_grad}


def largest_over_median(lm):
    """Of each layer's output, by transformers' own hidden states."""
    ids = torch.tensor([[5, 9, 2, 7, 30, 8]])
    with torch.no_grad():
        states = lm.base(ids, output_hidden_states=True).hidden_states
    return [float(h.abs().max() / h.abs().median()) for h in states[1:-1]]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_with_planted_outliers_alone_is_tuned(tiny, scheme, layer):
    lm = planted(tiny("llama"), layer)
    if layer == 0:  # that of the last layer is normalised there
        assert largest_over_median(lm)[0] > 1000
    path = stack_of(lm.base)[0]
    found, named = prepared(lm, **SCHEMES[scheme], only_layer="dominant"), tiny("llama")
    assert (found.only_layer, found.num_forwards) == (layer, 0)
    prepared(named, **SCHEMES[scheme], only_layer=layer)
    assert tuned_names(found) == tuned_names(named) != set()
    assert all(f"{path}.{layer}." in name for name in tuned_names(found))
    whole = tuned_names(prepared(tiny("llama"), **SCHEMES[scheme]))
    assert tuned_names(found) == {name for name in whole if f"{path}.{layer}." in name}


def test_without_outliers_the_numbers_of_each_layer_are_named(tiny):
    lm = tiny("opt")
    with pytest.raises(
        UsageError, match=r"only_layer: dominant: no layer's output has outliers.*0: .* and .*, 1: "
    ) as said:
        prepared(lm, tuning="lora", only_layer="dominant")
    assert "Choose a layer yourself, such as" in str(said.value)


def test_a_run_records_the_layer_so_that_resuming_and_replaying_need_no_pass(
    config, zotune, tmp_path, tiny, monkeypatch
):
    options = {"tuning": "full", "only_layer": "dominant", "max_steps": 2, "learning_rate": 1e-4}
    planted(tiny("llama"), 1).module.save_pretrained(tmp_path / "model")
    load(TrainConfig(model="random:llama-tiny", task="sst2")).tokenizer.save_pretrained(tmp_path / "model")
    made = config(**options, model=str(tmp_path / "model"), output_dir=tmp_path / "run")
    train(made)
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["only_layer"] == 1
    ledger = read(tmp_path / "run" / "ledger.zol")
    assert {name.split("layers.")[1][0] for name in (t["name"] for t in ledger.header.tensors)} == {"1"}
    monkeypatch.setattr("zotune.llm.models.tuned_sets.dominant.dominant_index", None)
    again = train(made.model_copy(update={"max_steps": 3, "resume": True}))
    assert again.num_steps == 3
    assert zotune("ledger", "verify", tmp_path / "run").code == 0


def test_a_dry_run_says_that_the_layer_is_found_later_and_counts_one_layer(config, capsys):
    facts = dry_run(config(tuning="full", only_layer="dominant", model="random:opt-tiny"))
    one = dry_run(config(tuning="full", only_layer=0, model="random:opt-tiny"))
    assert "finds its layer by a forward pass before the first step" in capsys.readouterr().err
    assert facts.num_tuned == one.num_tuned < facts.num_parameters / 2
    assert facts.config.only_layer == "dominant" and facts.memory.activations == one.memory.activations


REFUSED = {
    "two choices": ({"only_layer": 1, "tuned_layers": 1}, "in two ways"),
    "virtual tokens": ({"only_layer": 1, "tuning": "prompt"}, "only_layer needs tuning"),
    "streamed": ({"only_layer": "dominant", "offload_folder": "there"}, "does not go with offload_folder"),
    "no such name": ({"only_layer": "dominan"}, "dominant"),
    "negative": ({"only_layer": -1}, "equal to 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_chooses_no_layer_is_refused(name):
    options, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        TrainConfig.model_validate({"task": "sst2", **options})


def test_a_layer_that_the_model_does_not_have_is_refused(tiny):
    with pytest.raises(UsageError, match=r"only_layer is 9, but the model has 2 layers.*at most 1"):
        prepared(tiny("llama"), tuning="lora", only_layer=9)
