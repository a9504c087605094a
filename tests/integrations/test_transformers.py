"""Any Trainer tunes by forward passes: its losses and weights are the plain optimizer's, and all else is its own."""

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import zotune as zo
from problems import assert_same_bits
from zotune.integrations import transformers as module
from zotune.integrations.transformers import (
    ZerothOrderArguments,
    ZerothOrderMixin,
    ZOTrainer,
    ZOTrainingArguments,
    _metrics_of_training,
)
from zotune.llm.config.method import MethodOptions

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def model(**options):
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, attention_dropout=0.3, **SIZES, **options))


def rows(n=8, length=6):
    """Rows whose numbers of scored tokens differ."""
    tokens = torch.randint(64, (n, length), generator=torch.Generator().manual_seed(1))
    return [
        {"input_ids": x, "labels": torch.where(torch.arange(length) < i % 4, -100, x)} for i, x in enumerate(tokens)
    ]


@pytest.fixture
def made(tmp_path):
    """A function: a Trainer of few steps, by its arguments; it reads its rows in order."""

    def make(*, kind=ZOTrainer, arguments=ZOTrainingArguments, data=None, of=None, given=None, **options):
        plain = {
            **{"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": [], "disable_tqdm": True},
            **{"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1},
            **{"train_sampling_strategy": "sequential", "save_strategy": "no", "seed": 7},
        }
        known = {f.name for f in fields(arguments)}
        args = arguments(**{k: v for k, v in {**plain, **options}.items() if k in known})
        return kind(model=of or model(), args=args, train_dataset=data or rows(), **(given or {}))

    return make


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def token_mean(net, batch):
    """The mean over all scored tokens of a batch, by its definition, in float64."""
    ids, labels = (torch.stack([row[name] for row in batch]) for name in ("input_ids", "labels"))
    predictions = net(input_ids=ids, use_cache=False).logits.double()
    return F.cross_entropy(predictions[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def test_losses_and_weights_are_the_plain_optimizers_on_the_same_batches(made):
    trainer = made(
        gradient_accumulation_steps=2, lr_scheduler_type="linear", num_queries=2, method="zo_adam", mu=1e-2,
        adam_beta1=0.5, adam_beta2=0.9, adam_epsilon=1e-2, weight_decay=0.5,
    )  # fmt: skip
    trainer.train()
    other, data, found = model(), rows(), []
    opt = zo.zo_adam(
        other, lr=1e-2, mu=1e-2, num_queries=2, seed=7, betas=(0.5, 0.9), eps=1e-2, weight_decay=0.5
    )  # fmt: skip
    for step in range(4):
        opt.param_groups[0]["lr"] = 1e-2 * (1 - step / 4)
        batch = data[step % 2 * 4 :][:4]
        found.append(opt.step(lambda batch=batch: token_mean(other, batch)))
    assert losses(trainer) == pytest.approx(found, rel=1e-6)
    assert len(set(found)) == 4
    for ours, theirs in zip(trainer.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert trainer._stepped.optimizer.num_forwards == 16
    assert all(p.grad is None for p in trainer.model.parameters())


def test_losses_are_those_of_the_command_on_the_same_rows(made, tmp_path, tiny):
    from zotune.ledger import read
    from zotune.llm import TrainConfig, train
    from zotune.llm.tasks.load_data import load_rows

    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Is {i} even?", "completion": ("yes", "no")[i % 2]}) + "\n" for i in range(6))
    )
    config = TrainConfig(
        model="random:llama-tiny", device="cpu", train_file=path, num_dev=2, max_steps=3, tuning="full", seed=7,
        learning_rate=1e-3, mu=1e-3, per_device_train_batch_size=4, logging_steps=1, output_dir=tmp_path / "ours",
    )  # fmt: skip
    train(config)
    expected = [record.loss for record in read(tmp_path / "ours/ledger.zol")]
    lm = tiny("llama")
    data = [as_labels(example) for example in load_rows(lm, config).train]
    trainer = made(
        of=lm.module, data=data, given={"data_collator": hf.DataCollatorForSeq2Seq(lm.tokenizer)}, max_steps=3,
        per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    assert losses(trainer) == pytest.approx(expected, rel=1e-5)


def as_labels(encoded):
    """An example's right candidate as a row of a Trainer: position i predicts token i + 1."""
    right = encoded.candidates[encoded.label]
    ids = [*encoded.sequences[right.sequence], right.tokens[-1]]
    labels = [-100] * len(ids)
    for position, token in zip(right.positions, right.tokens, strict=True):
        labels[position + 1] = token
    return {"input_ids": ids, "labels": labels}


METHODS = {
    "adam in bfloat16": ({"method": "zo_adam"}, torch.bfloat16),
    "sparse, with a window": (
        {"method": "zo_sgd_mmt", "window": 3, "sparsity": 0.5, "mask_interval": 3, "blocks": "layer"}, torch.float32,
    ),
}  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(made, tmp_path, name):
    options, dtype = METHODS[name]
    plain = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "warmup_steps": 1, **options}
    whole = made(of=model().to(dtype), **plain)
    whole.train()
    resumed = made(of=model().to(dtype), **plain)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert_same_bits(resumed.model, whole.model)
    assert losses(resumed) == losses(whole)
    assert resumed._stepped.optimizer.state_dict()["zeroth_order"]["num_steps"] == 4


def test_evaluation_early_stopping_checkpoints_and_logs_are_the_trainers(made, tmp_path):
    trainer = made(
        given={"eval_dataset": rows(), "callbacks": [hf.EarlyStoppingCallback(1, early_stopping_threshold=9.0)]},
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=50,
        load_best_model_at_end=True, include_num_input_tokens_seen="all",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2  # the second evaluation was not better by 9
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    logged = {key for line in trainer.state.log_history for key in line}
    assert {"eval_loss", "learning_rate", "loss"} <= logged
    assert "grad_norm" not in logged
    assert trainer.state.num_input_tokens_seen == 2 * 2 * 6


def test_label_smoothing_and_an_own_loss_are_objectives(made):
    smoothed = made(label_smoothing_factor=0.1, max_steps=1)
    smoothed.train()
    batch = rows()[:2]
    ids, labels = (torch.stack([row[name] for row in batch]) for name in ("input_ids", "labels"))

    def by_definition():
        log_p = other(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)[:, :-1]
        wanted = labels[:, 1:]
        right = log_p.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
        return -(0.9 * right + 0.1 * log_p.mean(-1))[wanted != -100].mean()

    other = model()
    assert losses(smoothed) == pytest.approx([zo.zo_sgd(other, lr=0, seed=7).step(by_definition)], rel=1e-6)

    class Accuracy(ZOTrainer):
        def compute_loss(self, net, inputs, return_outputs=False, num_items_in_batch=None):
            wanted = inputs.pop("labels")  # as Trainers do, which must not reach the next probe
            return -float((net(**inputs).logits.argmax(-1) == wanted).float().mean())

    trainer = made(kind=Accuracy, mu=0.1)
    trainer.train()
    assert all(-1 <= loss <= 0 for loss in losses(trainer))


def test_a_step_reads_the_micro_batches_of_its_own_only(made):
    class StopsEarly(hf.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 1 and not stopped
            stopped.extend([1] * control.should_epoch_stop)
            return control

    seen, stopped = [], []

    class Noting(ZOTrainer):
        def compute_loss(self, net, inputs, *args, **kwargs):
            seen.append(inputs["input_ids"][0].tolist())
            return super().compute_loss(net, inputs, *args, **kwargs)

    trainer = made(kind=Noting, gradient_accumulation_steps=2, max_steps=3, given={"callbacks": [StopsEarly()]})
    trainer.train()
    first = [rows()[i]["input_ids"].tolist() for i in (0, 2)]
    assert seen[:8] == 4 * first  # the second epoch begins anew, without the micro-batch that the first left behind


def summed(outputs, labels, num_items_in_batch=None):
    wanted = labels[:, 1:]
    every = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
    return every / num_items_in_batch


TOLD = hasattr(hf.Trainer, "loss_is_scaled_for_ga")  # since transformers 5.19
NORMALISED = {
    "by the model": ({}, {}, {}),
    "by a function of the caller's": ({}, {"compute_loss_func": summed}, {}),
    "by a function alone": ({}, {"compute_loss_func": summed}, {"accepts_loss_kwargs": False}),
    "by nobody": ({}, {}, {"accepts_loss_kwargs": False}),
    **({"as told: summed": ({"loss_is_scaled_for_ga": True}, {}, {"accepts_loss_kwargs": False})} if TOLD else {}),
    **({"as told: averaged": ({"loss_is_scaled_for_ga": False}, {}, {})} if TOLD else {}),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_the_objective_is_normalised_as_the_trainer_normalises_its_loss(made, name):
    attributes, given, of_model = NORMALISED[name]
    found = []
    for base, options in ((ZOTrainer, {"mu": 1e-4}), (hf.Trainer, {"optim": "sgd"})):
        net = model()
        net.config.attention_dropout = 0.0
        for layer in net.model.layers:
            layer.self_attn.attention_dropout = 0.0
        vars(net).update(of_model)
        trainer = made(
            kind=type("Told", (base,), attributes), of=net, given=given, gradient_accumulation_steps=2, max_steps=1,
            arguments=ZOTrainingArguments if base is ZOTrainer else hf.TrainingArguments, **options,
        )  # fmt: skip
        trainer.train()
        found += losses(trainer)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_step_keeps_nothing_and_runs_the_whole_model_for_each_probe(made):
    net = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, **{**SIZES, "num_hidden_layers": 2}))
    calls = []
    net.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    # What a Trainer's loss runs may differ from call to call, so no block's probe takes over another's activations.
    trainer = made(of=net, blocks="layer", max_steps=2)
    trainer.train()
    assert len(calls) == trainer._stepped.optimizer.num_forwards > 8
    assert trainer._micro_batches == []


def test_losses_are_computed_as_the_trainer_does_and_added_up_in_double_precision(made, monkeypatch):
    prepared, dtypes, entered, inside = [], [], [], []

    class Noting(ZOTrainer):
        def _prepare_inputs(self, inputs):
            prepared.append(1)
            return super()._prepare_inputs(inputs)

        def compute_loss_context_manager(self):
            entered.append(1)
            return super().compute_loss_context_manager()

    real = module.averaged
    monkeypatch.setattr(module, "averaged", lambda a, values: dtypes.append(values.dtype) or real(a, values))
    net = model()
    net.lm_head.register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    made(kind=Noting, of=net, bf16=True, gradient_accumulation_steps=2, max_steps=1, mu=1e-2).train()
    assert (len(prepared), len(entered)) == (2, 4)
    assert inside == [True] * 4
    assert dtypes == [torch.float64] * 2


def test_only_trainers_that_file_metrics_by_mode_see_the_model_in_training():
    for metrics, inside in (({}, False), ({"_metrics": {}}, True)):
        trainer = SimpleNamespace(model=SimpleNamespace(training=False), **metrics)
        with pytest.raises(KeyError), _metrics_of_training(trainer):
            assert trainer.model.training == inside
            raise KeyError
        assert not trainer.model.training


def test_an_optimizer_of_ones_own_is_used_and_its_schedule_too(made):
    net = model()
    opt = zo.zo_sgd(net, lr=1e-3, sampler=zo.gaussian, params=list(net.lm_head.parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    trainer = made(of=net, given={"optimizers": (opt, schedule)})
    trainer.train()
    assert (opt.num_steps, opt.param_groups[0]["lr"]) == (4, 1e-3 / 16)
    trainer.train()
    assert opt.num_steps == 8


def test_a_step_whose_loss_is_no_number_is_skipped_and_said(made, caplog):
    class Broken(ZOTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * float("nan")

    trainer = made(kind=Broken, max_steps=2)
    before = model()
    trainer.train()
    assert_same_bits(trainer.model, before)
    assert caplog.text.count("was skipped") == 2
    with pytest.raises(zo.NonFiniteLossError, match="10 steps in a row"):
        made(kind=Broken, max_steps=20).train()


def with_attributes(**attributes):
    def change(trainer):
        vars(trainer).update(attributes)

    return change


class Flat(ZOTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * 0 + 1


class OwnStep(hf.Trainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


def of_another_library():
    """A trainer that has the name of one of TRL's, and a step of its own."""
    theirs = type("SFTTrainer", (OwnStep,), {"training_step": OwnStep.training_step})
    return type("Mixed", (ZerothOrderMixin, theirs), {})


class OwnStepByForwardPasses(ZerothOrderMixin, OwnStep):
    pass


REFUSED = {
    "max_grad_norm": ({"max_grad_norm": 0.5}, {}, None, "max_grad_norm=0.5 clips gradients.*max_coefficient"),
    "optim": ({"optim": "adafactor"}, {}, None, "optim would not be used"),
    "optim_args": ({"optim_args": "a=1"}, {}, None, "optim_args would not be used"),
    "neftune": ({"neftune_noise_alpha": 5.0}, {}, None, "neftune_noise_alpha"),
    "fp16": ({}, {}, lambda t: setattr(t.accelerator, "scaler", object()), "fp16=True scales the loss"),
    "DeepSpeed": ({}, {}, with_attributes(is_deepspeed_enabled=True), "DeepSpeed shards"),
    "FSDP": ({}, {}, with_attributes(is_fsdp_enabled=True), "FSDP shards"),
    "fp16 of the arguments": ({}, {}, lambda t: setattr(t.args, "fp16", True), "fp16=True scales the loss"),
    "FSDP of XLA": ({}, {}, with_attributes(is_fsdp_xla_enabled=True), "FSDP shards"),
    "parallelism": ({}, {}, lambda t: setattr(t.args, "parallelism_config", object()), "sequence parallelism shard"),
    "sharded loading": ({}, {}, with_attributes(is_distributed_loading_by_transformers=True), "parallelism shard"),
    "optim_target_modules": ({"optim_target_modules": "all-linear"}, {}, None, "optim_target_modules would not be"),
    "optimizer_cls_and_kwargs": (
        {}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, None, "optimizer_cls_and_kwargs would not be used",
    ),
    "a wrapped optimizer with gradients": (
        {}, {}, with_attributes(optimizer=SimpleNamespace(optimizer=torch.optim.SGD(model().parameters()))),
        "optimizers holds SGD",
    ),
    "several GPUs": ({}, {}, lambda t: setattr(t.args, "_n_gpu", 4), "4 GPUs in one process.*torchrun"),
    "an optimizer with gradients": (
        {}, {"optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), None)}, None, "optimizers holds SGD",
    ),
    "a step of its own": ({"kind": OwnStepByForwardPasses}, {}, None, "OwnStep has a training_step of its own"),
    "a step of another SFTTrainer": (
        {"kind": of_another_library()}, {}, None, "SFTTrainer has a training_step of its own",
    ),
    "a first-order method": ({"method": "fo_adam"}, {}, None, "method is fo_adam, which back-propagates"),
    "a value out of range": ({"mu": -1.0}, {}, None, "ZOTrainingArguments: mu is -1.0"),
    "an option without effect": ({"adam_beta2": 0.9}, {}, None, "adam_beta2 has no effect here"),
    "a mu too small": ({"mu": 1e-20}, {}, None, "mu is 1e-20, too small"),
    "a flat loss": ({"kind": Flat}, {}, None, "both probes gave the same loss"),
    "an update that rounding removes": (
        {"half": True, "rounding": "nearest", "learning_rate": 1e-12}, {}, None, "cannot work with rounding to nearest",
    ),
    "smoothing in half precision": (
        {"label_smoothing_factor": 0.1, "half": True}, {}, None, "label_smoothing_factor computes .* torch.bfloat16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_together_is_refused_by_name(made, name):
    options, given, change, message = REFUSED[name]
    half = options.get("half", False)
    trainer = made(of=model().bfloat16() if half else None, given=given, **options)
    if change is not None:
        change(trainer)
    with pytest.raises(zo.UsageError, match=message) as refusal:
        trainer.create_optimizer() if change is not None else trainer.train()
    assert " --" not in str(refusal.value).replace("torchrun --nproc", "")


def test_a_method_without_probes_has_no_mu_to_check(made):
    trainer = made(method="forward_grad", mu=1e-20, max_steps=1)
    trainer.train()
    assert trainer._mu is None


def test_a_loss_in_half_precision_is_refused(made):
    class Coarse(ZOTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs).bfloat16()

    with pytest.raises(zo.UsageError, match="too coarse for differences"):
        made(kind=Coarse).train()


def test_gradient_checkpointing_is_said_to_have_no_effect(made, caplog):
    made(gradient_checkpointing=True, activation_checkpointing=True, max_steps=1).train()
    assert "gradient checkpointing has no effect" in caplog.text


def test_the_options_are_those_of_the_command_and_a_script_reads_them_from_its_command_line(made, tmp_path):
    ours = {f.name: f.default for f in fields(ZerothOrderArguments)}
    # The default of μ depends on what is tuned.
    assert ours == {name: None if name == "mu" else MethodOptions.model_fields[name].default for name in ours}
    trainers = {f.name for f in fields(hf.TrainingArguments)}
    without = {"directions_per_batch", "flipped"}  # a Trainer's loss is the mean of its batch
    assert {n for n in MethodOptions.model_fields if not n.startswith("hybrid_")} - without == ours.keys() | (
        MethodOptions.model_fields.keys() & trainers
    )
    line = ["--output_dir", str(tmp_path), "--method", "zo_adam", "--mu", "1e-2", "--blocks", "layer", "--use_cpu"]
    (args,) = hf.HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(line)
    assert (args.method, args.mu, args.blocks, args.num_queries) == ("zo_adam", 1e-2, "layer", 1)
    hf.HfArgumentParser(ZOTrainingArguments).format_help()


def test_a_model_card_names_zotune_and_the_method_in_place_of_adamw(made, tmp_path):
    trainer = made(max_steps=1, method="zo_sgd_sign")
    trainer.train()
    trainer.create_model_card(model_name="mine", tags="own")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    head, body = card.split("---")[1:3]
    assert {f"- {tag}" for tag in ("own", "zotune", "zeroth-order")} <= set(head.splitlines())
    assert f"\n- optimizer: zo_sgd_sign of zotune {zo.__version__}, by forward passes alone\n- lr_scheduler" in body
    assert "adamw" not in card
    assert trainer.model.model_tags == ["zotune", "zeroth-order"]
    # Of several processes, the first one writes.
    (tmp_path / "out/README.md").write_text("- optimizer: of another process\n", encoding="utf-8")
    made(kind=type("Other", (ZOTrainer,), {"is_world_process_zero": lambda self: False})).create_model_card()
    assert "of another process" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_arguments_without_the_options_mean_the_defaults(made):
    trainer = made(arguments=hf.TrainingArguments, max_steps=1)
    trainer.train()
    assert trainer._stepped.optimizer.num_forwards == 2


def test_the_loops_own_step_without_one_of_ours_is_an_error(made):
    trainer = made(max_steps=1)
    trainer.train()
    with pytest.raises(zo.UsageError, match=r"training_step has taken.*opt\.step\(closure\)"):
        trainer.optimizer.step()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_arguments_without_mu_are_written_and_take_the_default_of_what_is_tuned(made):
    args = ZOTrainingArguments("x", use_cpu=True)
    assert json.loads(args.to_json_string())["mu"] is None
    (parsed,) = hf.HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(["--output_dir", "x"])
    assert parsed.mu is None
    from peft import LoraConfig, get_peft_model

    for of, mu in ((model(), 1e-3), (get_peft_model(model(), LoraConfig(target_modules=["q_proj"])), 1e-2)):
        trainer = made(of=of, max_steps=1)
        trainer.train()
        assert trainer._mu == mu


@pytest.mark.parametrize(("rate", "said"), [(1e-9, "below the range"), (10.0, "above the range"), (1e-3, "")])
def test_a_learning_rate_at_which_nothing_is_learned_is_named(made, caplog, rate, said):
    made(learning_rate=rate, max_steps=1).train()
    assert ("range" in caplog.text) == bool(said)
    assert said in caplog.text
    assert "--" not in caplog.text
