"""Small tuned sets: which numbers they tune, what forward passes find for them, and that peft loads them alone."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

import zotune as zo
from tuning_schemes import EXAMPLES, moved, prepared
from zotune.errors import UsageError
from zotune.ledger import read
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.collator import collate
from zotune.llm.data.tokenization import Candidate, Encoder
from zotune.llm.models.activation_cache import SequenceCache
from zotune.llm.models.activation_storage.tiers import ActivationStore, MemoryTier
from zotune.llm.models.load import load
from zotune.llm.models.tuned_sets.aim import Aim, num_free
from zotune.llm.models.tuned_sets.find import find_aim, planned_aim, set_aim
from zotune.llm.training.optimizers import make_optimizer
from zotune.llm.training.train import train
from zotune.model.layers import stack_of
from zotune.plan.options import PlanConfig
from zotune.plan.planning import plan

SETS = {
    "norms": {"tuning": "norms"},
    "last norm": {"tuning": "norms", "tuned_layers": 0},
    "last layer's norms": {"tuning": "norms", "tuned_layers": 1},
}


def config_of(**options):
    return TrainConfig.model_validate({"task": "sst2", **options})


def rows_of(lm):
    encoder = Encoder(lm.tokenizer, masked=lm.masked, context=lm.context, max_length=None)
    return [encoder(e) for e in EXAMPLES]


def aimed(lm, **options):
    prepared(lm, **options)
    set_aim(lm, find_aim(lm, config_of(**options), rows_of(lm)))
    return lm


def tuned_names(lm):
    return {name for name, p in lm.module.named_parameters() if p.requires_grad}


def test_norms_are_the_gains_and_the_last_norm_is_that_of_no_layer(tiny, family):
    gains = {
        f"{name}.weight"
        for name, m in tiny(family).module.named_modules()
        if "norm" in type(m).__name__.lower() and getattr(m, "weight", None) is not None
    }
    path = stack_of(tiny(family).module)[0]
    before = {"roberta": {"roberta.embeddings.LayerNorm.weight"}}.get(family, set())
    assert tuned_names(prepared(tiny(family), tuning="norms")) == gains
    last = {name for name in gains if not name.startswith(f"{path}.")} - before
    assert len(last) == 1
    assert tuned_names(prepared(tiny(family), tuning="norms", tuned_layers=0)) == last
    of_last = {name for name in gains if name.startswith(f"{path}.1.")}
    assert tuned_names(prepared(tiny(family), tuning="norms", tuned_layers=1)) == last | of_last


def test_biases_are_all_biases_and_a_model_without_any_is_refused(tiny):
    biases = {n for n, _ in tiny("opt").module.named_parameters() if n.endswith(".bias")}
    assert len(biases) > 10
    assert tuned_names(prepared(tiny("opt"), tuning="biases")) == biases
    above = tuned_names(prepared(tiny("opt"), tuning="biases", tuned_layers=0))
    assert above == {"model.decoder.final_layer_norm.bias"}
    with pytest.raises(UsageError, match=r"tuning: biases: nothing would be tuned, for .* has no bias"):
        prepared(tiny("llama"), tuning="biases")


def test_a_pass_that_tunes_the_last_norm_computes_a_norm_and_the_head(tiny, causal_family):
    """Of the modules with numbers only the last norm and the head run: all layers return what they hold."""
    lm = prepared(tiny(causal_family), tuning="norms", tuned_layers=0)
    encoded = rows_of(lm)
    batch = collate(encoded, lm.pad_token_id, torch.device("cpu"))
    cache = SequenceCache(lm, ActivationStore([MemoryTier(1 << 20)]), [[s for e in encoded for s in e.sequences]])
    assert cache.depth == len(stack_of(lm.base)[1])
    with torch.no_grad():
        first = cache.score(batch)
        ran = []
        for name, m in lm.base.named_modules():
            if next(m.parameters(recurse=False), None) is not None:
                m.register_forward_hook(lambda *_, name=name: ran.append(name))
        assert torch.equal(cache.score(batch), first)
    inside = [name for name in ran if name.startswith(f"{stack_of(lm.base)[0]}.")]
    assert not inside
    above = [name for name in ran if "embed" not in name]
    assert len(above) <= 2, above
    torch.testing.assert_close(first, lm.score(batch), rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_lora_fa_freezes_a_alone(tiny, family):
    names = tuned_names(prepared(tiny(family), tuning="lora_fa"))
    lora = tuned_names(prepared(tiny(family), tuning="lora"))
    assert names == {n for n in lora if ".lora_B." in n}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_lora_xs_is_the_formula_with_the_singular_vectors(tiny, family, tmp_path):
    """Steps of R against W + (α/r) U Σ R Vᵀ by hand; then peft alone computes the same from the folder."""
    options = {"tuning": "lora_xs", "lora_r": 3, "tuned_layers": 1}
    lm = aimed(tiny(family), **options)
    layers = [(n, m) for n, m in lm.module.named_modules() if isinstance(m, LoraLayer)]
    assert num_free(lm.module, lm.aim) == 9 * len(layers)
    opt = make_optimizer(lm.module, config_of(**options, learning_rate=0.5), 0, aim=lm.aim)
    batch = collate(rows_of(lm), lm.pad_token_id, torch.device("cpu"))
    with torch.no_grad():
        before = lm.score(batch)
        assert torch.equal(before, tiny(family).score(batch))  # R begins with zeros
        for _ in range(3):
            opt.step(lambda: lm.losses(batch).mean())
        after = lm.score(batch)
    assert not torch.equal(after, before)
    for _, layer in layers:
        weight = layer.get_base_layer().weight.detach().double()
        _, s, vt = torch.linalg.svd(weight)
        a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
        assert torch.allclose(a.t() @ a, vt[:3].t() @ vt[:3], atol=2e-2)  # random weights have hardly a gap
        space = weight @ a.t()
        r = torch.linalg.lstsq(space, b).solution
        assert float((space @ r - b).norm()) < 1e-5 * float(b.norm())
        assert float(b.norm()) > 0
        assert torch.allclose(space.norm(dim=0), s[:3], rtol=2e-2)
    lm.module.save_pretrained(str(tmp_path), save_embedding_layers=False)
    plain = tiny(family)
    plain.module = PeftModel.from_pretrained(plain.module, str(tmp_path)).eval()
    torch.testing.assert_close(plain.score(batch), after, rtol=0, atol=1e-6)


def test_eva_takes_the_principal_components_of_the_inputs(tiny, tmp_path):
    lm = aimed(tiny("llama"), tuning="lora", lora_init="eva", lora_r=2)
    batch = collate(rows_of(lm), lm.pad_token_id, torch.device("cpu"))
    seen = {}
    for name, m in lm.module.named_modules():
        if isinstance(m, LoraLayer):
            m.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].detach()}))
    with torch.no_grad():
        score = lm.score(batch)
    assert torch.equal(score, tiny("llama").score(batch))  # B begins with zeros
    layers = {n: m for n, m in lm.module.named_modules() if isinstance(m, LoraLayer)}
    for name, x in seen.items():
        rows = x.reshape(-1, x.shape[-1])[batch.attention_mask.view(-1).bool()].double()
        rows = rows - rows.mean(0)
        a = layers[name].lora_A["default"].weight.detach().double()
        assert torch.allclose(a @ a.t(), torch.eye(2, dtype=torch.float64), atol=1e-4)
        best = torch.linalg.svdvals(rows)[:2].square().sum()
        assert float((rows @ a.t()).square().sum()) > 0.95 * float(best)
    moved(lm).module.save_pretrained(str(tmp_path), save_embedding_layers=False)
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["init_lora_weights"] == "eva"
    plain = tiny("llama")
    plain.module = PeftModel.from_pretrained(plain.module, str(tmp_path)).eval()
    torch.testing.assert_close(plain.score(batch), lm.score(batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", ["vera", "ia3"])
def test_schemes_with_a_name_are_pefts_on_the_layers_asked_for(tiny, scheme, tmp_path):
    keys = {"peft_config": {"r": 4}} if scheme == "vera" else {}
    lm = moved(prepared(tiny("llama"), tuning=scheme, tuned_layers=1, **keys))
    assert tuned_names(lm)
    assert all(".layers.1." in name for name in tuned_names(lm))
    assert tuned_names(prepared(tiny("llama"), tuning=scheme, **keys)) > tuned_names(lm)
    batch = collate(rows_of(lm), lm.pad_token_id, torch.device("cpu"))
    lm.module.save_pretrained(str(tmp_path), save_embedding_layers=False)
    plain = tiny("llama")
    plain.module = PeftModel.from_pretrained(plain.module, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain.score(batch), lm.score(batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "roberta"])
def test_components_of_the_last_norm_hold_the_gradient_of_its_gain(tiny, family):
    """Found without a derivative; back-propagation says where each example's gradient lies."""
    lm = tiny(family)
    rows = [
        replace(row, candidates=tuple(Candidate(0, row.candidates[0].positions[:1], (token,)) for token in (70, 90)))
        for row in rows_of(lm)
    ]
    options = {"tuning": "norms", "tuned_layers": 0, "activation_rank": len(EXAMPLES)}
    set_aim(prepared(lm, **options), find_aim(lm, config_of(**options), rows))
    (tensor,) = zo.ParameterSet(lm.module)
    q = lm.aim.subspaces[tensor.name].left.double()
    assert torch.allclose(q.t() @ q, torch.eye(len(EXAMPLES), dtype=torch.float64), atol=1e-4)
    for row in rows:
        loss = lm.losses(collate([row], lm.pad_token_id, torch.device("cpu"))).sum()
        (gradient,) = torch.autograd.grad(loss, tensor.parameter)
        g = gradient.double()
        assert float((g - q @ (q.t() @ g)).norm()) < 1e-3 * float(g.norm())
    assert num_free(lm.module, lm.aim) == len(EXAMPLES)


def test_components_of_a_layer_are_those_of_tokens_without_padding(tiny):
    lm = aimed(tiny("llama"), tuning="full", activation_rank=2)
    batch = collate(rows_of(lm), lm.pad_token_id, torch.device("cpu"))
    seen, layer = [], lm.base.model.layers[1]
    layer.mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    with torch.no_grad():
        lm.score(batch)
    x = seen[0].reshape(-1, seen[0].shape[-1])[batch.attention_mask.view(-1).bool()].double()
    q = lm.aim.subspaces["model.layers.1.mlp.up_proj.weight"].right.double()
    assert float((x @ q).square().sum()) > 0.999 * float(torch.linalg.svdvals(x)[:2].square().sum())
    assert "model.layers.1.input_layernorm.weight" in lm.aim.subspaces
    assert "model.embed_tokens.weight" not in lm.aim.subspaces


def test_what_is_found_survives_the_ledgers_header_to_the_bit(tiny):
    lm = aimed(tiny("llama"), tuning="lora_fa", lora_init="eva", lora_r=2, activation_rank=1)
    again = Aim.from_json(json.loads(json.dumps(lm.aim.to_json())), "a ledger")
    assert again.values.keys() == lm.aim.values.keys()
    assert again.subspaces.keys() == lm.aim.subspaces.keys()
    assert all(torch.equal(v, again.values[n]) for n, v in lm.aim.values.items())
    for name, space in lm.aim.subspaces.items():
        assert torch.equal(space.right, again.subspaces[name].right)
    for wrong in ({}, {"values": {"a": {"shape": [2], "float32": "AAAA"}}, "subspaces": {}}, {"values": 3}):
        with pytest.raises(UsageError, match="cannot be understood"):
            Aim.from_json(wrong, "a ledger")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tuning": "lora_xs", "method": "zo_adam"}, "steps do not stay there"),
        ({"tuning": "lora_xs", "method": "fo_sgd"}, "steps do not stay there"),
        ({"tuning": "lora_xs", "rank": 1}, "with rank steps do not stay"),
        ({"tuning": "lora", "tuned_layers": 0}, "leaves no layer"),
        ({"tuning": "norms", "lora_init": "eva"}, "lora_init needs tuning: lora or lora_fa"),
        ({"tuning": "lora", "lora_init": "eva", "offload_folder": "o"}, "does not go with offload_folder"),
        ({"tuning": "norms", "activation_rank": 2, "shard": "fsdp"}, "does not go with shard"),
        ({"activation_rank": 2, "rank": 1}, "directions in two ways"),
        ({"activation_rank": 2, "method": "fo_adam"}, "activation_rank has no effect here"),
        ({"activation_rank": 2, "method": "subzero"}, "activation_rank has no effect here"),
        ({"direction_scale": "inputs", "method": "fo_adam"}, "direction_scale: inputs has no effect here"),
        ({"direction_scale": "inputs", "activation_rank": 2}, "directions in two ways"),
        ({"direction_scale": "inputs", "flipped": True, "directions_per_batch": 2}, "directions in two ways"),
        ({"direction_scale": "inputs", "tuning": "lora_xs"}, "steps do not stay|directions in two ways"),
        ({"direction_scale": "inputs", "tuning": "norms", "shard": "fsdp"}, "does not go with shard"),
    ],
    ids=repr,
)
def test_what_does_not_go_together_is_refused_in_words(options, why):
    with pytest.raises(ValueError, match=why):
        TrainConfig(task="sst2", **options)


def test_ia3_of_an_unknown_type_and_lora_xs_of_too_high_a_rank_are_refused(tiny, monkeypatch):
    monkeypatch.delitem(TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, "llama")
    with pytest.raises(UsageError, match="peft knows no layers to adapt"):
        prepared(tiny("llama"), tuning="ia3")
    lm = prepared(tiny("llama"), tuning="lora_xs", lora_r=64)
    with pytest.raises(UsageError, match="fewer than lora_r: 64"):
        find_aim(lm, config_of(tuning="lora_xs", lora_r=64), [])


def test_a_library_without_rows_says_what_is_missing(tiny):
    lm = prepared(tiny("llama"), tuning="norms")
    with pytest.raises(UsageError, match="what zotune train finds before the first step"):
        make_optimizer(lm.module, config_of(tuning="norms", activation_rank=2), 0)


@pytest.mark.parametrize(
    "options",
    [
        {"tuning": "norms"},
        {"tuning": "norms", "activation_rank": 2},
        {"tuning": "lora_xs", "lora_r": 2},
        {"tuning": "lora_fa", "lora_init": "eva", "lora_r": 2},
        {"tuning": "full", "activation_rank": 2},
        {"tuning": "norms", "direction_scale": "inputs"},
    ],
    ids=repr,
)
def test_a_plan_counts_what_a_run_has(tiny, options):
    """The free numbers of a plan, on meta, are those of the run; bases count as state."""
    lm = aimed(tiny("llama"), **options) if options != {"tuning": "norms"} else prepared(tiny("llama"), **options)
    meta = prepared(tiny("llama"), **options)
    assert num_free(meta.module, planned_aim(meta, config_of(**options))) == num_free(lm.module, lm.aim)
    names = {"lora_r": options["lora_r"]} if "lora_r" in options else {}
    (row,) = plan(
        PlanConfig(model="random:llama-tiny", method="zo_sgd", length=8, **{**options, **names}, device="cpu")
    ).rows
    spaces = {} if lm.aim is None else lm.aim.subspaces
    sides = [t for s in spaces.values() for t in (s.left, s.right) if t is not None]
    sides += [] if lm.aim is None else lm.aim.scales.values()
    if "direction_scale" in options:
        assert row.prediction.state == 4 * sum(p.numel() for p in lm.module.parameters() if p.requires_grad)
    if options["tuning"] == "lora_xs":
        assert row.prediction.state == 4 * sum(t.numel() for t in sides)
    assert (row.prediction.state > 0) == bool(sides)


@pytest.mark.parametrize(
    "options",
    [
        {"tuning": "norms", "tuned_layers": 0, "activation_rank": 3, "method": "zo_sgd_mmt"},
        {"tuning": "lora_xs", "lora_r": 2, "save_steps": 2},
        {"tuning": "lora_fa", "lora_init": "eva", "lora_r": 2},
        {"tuning": "norms", "tuned_layers": 0, "direction_scale": "inputs", "directions_per_batch": 2},
    ],
    ids=repr,
)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(config, tmp_path, options):
    made = {"learning_rate": 1e-2, **options}
    train(config(**made, max_steps=5, output_dir=tmp_path / "whole"))
    train(config(**made, max_steps=3))
    header = read(tmp_path / "out/ledger.zol").header
    train(config(**made, max_steps=5, resume=True))
    assert read(tmp_path / "out/ledger.zol").header == header
    (one,), (other,) = ((tmp_path / f).glob("*model.safetensors") for f in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()
    assert one.name == ("model.safetensors" if options["tuning"] == "norms" else "adapter_model.safetensors")


def test_going_on_from_an_adapter_keeps_its_frozen_side(config, tmp_path):
    base = tmp_path / "base"
    lm = load(config(output_dir=tmp_path / "x"))
    lm.module.save_pretrained(str(base))
    lm.tokenizer.save_pretrained(str(base))
    train(config(model=str(base), tuning="lora", max_steps=2, learning_rate=1e-2, output_dir=tmp_path / "a"))
    first = load(config(model=str(tmp_path / "a"), output_dir=tmp_path / "x"))
    before = {n: p.detach().clone() for n, p in first.module.named_parameters() if "lora_" in n}
    options = {"model": str(tmp_path / "a"), "tuning": "lora_fa", "max_steps": 2, "learning_rate": 0.1}
    after = dict(train(config(**options, output_dir=tmp_path / "b")).model.named_parameters())
    assert all(torch.equal(before[n], after[n]) == (".lora_A." in n) for n in before)
    with pytest.raises(UsageError, match="lora_init: eva contradicts"):
        train(config(**options, lora_init="eva", output_dir=tmp_path / "c"))
    with pytest.raises(UsageError, match="is an adapter"):
        train(config(**{**options, "tuning": "lora_xs"}, output_dir=tmp_path / "d"))


def test_scales_are_those_of_the_scored_positions_and_of_tokens_alone(tiny):
    """Against hooks on plain passes of each row alone, where there is no padding."""
    lm = aimed(tiny("llama"), tuning="norms", direction_scale="inputs")
    seen: dict[str, list[torch.Tensor]] = {}
    names = {f"{name}.weight": m for name, m in lm.base.named_modules() if "Norm" in type(m).__name__}
    for row in rows_of(lm):
        batch, kept = collate([row], lm.pad_token_id, torch.device("cpu")), {}
        hooks = [
            m.register_forward_hook(lambda m, args, out, name=name, kept=kept: kept.update({name: out / m.weight}))
            for name, m in names.items()
        ]
        with torch.no_grad():
            lm.base(input_ids=batch.input_ids)
        for hook in hooks:
            hook.remove()
        for name, out in kept.items():
            rows = out[0] if ".layers." in name else out[0][batch.positions]
            seen.setdefault(name, []).append(rows.double())
    assert lm.aim.scales.keys() == seen.keys()
    for name, rows in seen.items():
        inverse = 1 / torch.cat(rows).square().mean(0).sqrt()
        assert torch.allclose(lm.aim.scales[name].double(), inverse / inverse.square().mean().sqrt(), rtol=1e-4), name


def test_all_methods_that_stay_in_a_subspace_do(tiny):
    for method in ("zo_sgd", "zo_sgd_mmt", "zo_sgd_sign", "fzoo", "randopt", "forward_grad"):
        lm = aimed(tiny("llama"), tuning="norms", tuned_layers=0, activation_rank=2)
        before = lm.base.model.norm.weight.detach().clone()
        made = config_of(tuning="norms", tuned_layers=0, activation_rank=2, method=method, learning_rate=0.1)
        opt = make_optimizer(lm.module, made, 0, aim=lm.aim)
        batch = collate(rows_of(lm), lm.pad_token_id, torch.device("cpu"))
        for _ in range(2):
            opt.step(lambda lm=lm, batch=batch: lm.losses(batch).mean())
        step = (lm.base.model.norm.weight.detach() - before).double()
        (space,) = lm.aim.subspaces.values()
        q = space.left.double()
        assert float(step.norm()) > 0, method
        assert float((step - q @ (q.t() @ step)).norm()) < 1e-5 * float(step.norm()) + 1e-6, method
    assert isinstance(opt, zo.ZerothOrder)
