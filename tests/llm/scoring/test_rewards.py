"""Objectives without a gradient are what they say: minus a mean over examples, the same draws for all probes."""

import json
import math
from contextlib import closing

import numpy as np
import pytest
import torch

import zotune as zo
from zotune.errors import RunError, UsageError
from zotune.estimate import perturb
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.finite_difference import central_difference
from zotune.estimate.objective import probing
from zotune.llm.config.data import DataOptions
from zotune.llm.config.objective import OF_ANSWERS, OF_CANDIDATES, ObjectiveOptions
from zotune.llm.config.run import TrainConfig, read_recipe
from zotune.llm.data.collator import collate
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoder
from zotune.llm.models.activation_storage.tiers import ActivationStore, MemoryTier
from zotune.llm.models.prompt_cache import PromptCache
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.output.output_folder import OutputFolder
from zotune.llm.scoring import generation
from zotune.llm.scoring.accuracy import evaluate_accuracy
from zotune.llm.scoring.functions import load_function
from zotune.llm.scoring.generated_answers import exact_match, f1
from zotune.llm.scoring.generation import Sampling, generate
from zotune.llm.scoring.objectives import ACCURACY, OBJECTIVES, mean_loss
from zotune.llm.scoring.rewards import OF_ANSWERS as REWARDS
from zotune.llm.scoring.rewards import Completion, GeneratedObjective, checked_rewards, open_ended
from zotune.llm.tasks.load_data import load_rows
from zotune.llm.training.loop import Run
from zotune.llm.training.step import check_first_estimate
from zotune.llm.training.train import train
from zotune.model.layers import stack_of
from zotune.model.parameters import ParameterSet
from zotune.noise import derive_seed
from zotune.system import limits

ZEROTH_ORDER = [name for name in zo.METHODS if name not in ("forward_grad", "grzo")]
PROMPTS = ("Question: who?\nAnswer:", "A", "A longer prompt.\nQuestion: what is it, then?\nAnswer:", "so it", "A")
DRAWN = {"generation": "sample", "max_new_tokens": 6, "stop_at": "end"}


def letters(completions):
    """A reward with many values: the mean code of the letters, and a part of the prompt."""
    return [sum(map(ord, c.text)) / (1 + len(c.text)) + len(c.prompt) for c in completions]


def encode(lm, prompts=PROMPTS):
    encoder = Encoder(lm.tokenizer, masked=False, context=lm.context, max_length=None)
    return [encoder(Example(p, (), 0, answers=("x", "y z"))) for p in prompts]


def generated(reward=letters, seed=3, **options):
    return GeneratedObjective("tests:letters", reward, ObjectiveOptions(objective="tests:letters", **options), seed)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function: write a module of rewards into the current folder; `NAME:FUNCTION` of it can be found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    made = []

    def write(text):
        made.append(f"rewards_{tmp_path.name}_{len(made)}".replace("-", "_"))
        (tmp_path / f"{made[-1]}.py").write_text(text, encoding="utf-8")
        return made[-1]

    return write


def test_the_names_of_the_options_are_those_of_the_tables():
    assert set(OF_CANDIDATES) == OBJECTIVES.keys() and set(OF_ANSWERS) == REWARDS.keys()


@pytest.mark.sample(3)
@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_accuracy_is_minus_the_share_of_best_candidates_that_are_right(tiny, causal_family, batch_size, plain_score):
    lm = tiny(causal_family)
    examples = [
        Example(f"{'x' * n} It", (" is abc", " was", " will"), n % 3, also_right=((n + 1) % 3,) if n % 4 == 0 else ())
        for n in range(1, 13)
    ]
    encoder = Encoder(lm.tokenizer, masked=False, context=lm.context, max_length=None)
    encoded = [encoder(e) for e in examples]
    hits = 0
    for e in examples:
        values = [plain_score(lm, e.prompt, c) for c in e.candidates]
        hits += values.index(max(values)) in (e.label, *e.also_right)
    assert 0 < hits < len(examples)
    found = evaluate_accuracy(lm, encoded, batch_size, objective=ACCURACY)
    assert found.loss == pytest.approx(-hits / len(examples)) and found.accuracy == pytest.approx(hits / len(examples))
    batch = collate(encoded, lm.pad_token_id, lm.device)
    assert mean_loss(ACCURACY, lm.score(batch), batch, encoded).item() == pytest.approx(-hits / len(examples))


@torch.no_grad()
@pytest.mark.parametrize("name", OF_ANSWERS)
def test_objectives_of_answers_are_minus_their_mean(tiny, name):
    lm = tiny("opt")
    encoded = encode(lm)
    texts = [generate(lm, [e.prompt])[0] for e in encoded]
    encoder = Encoder(lm.tokenizer, masked=False, context=lm.context, max_length=None)
    # Some answers are right, so that the mean is not zero.
    encoded = [encoder(Example(p, (), 0, answers=("q", texts[i] if i % 2 else "r"))) for i, p in enumerate(PROMPTS)]
    score = {"f1": f1, "exact_match": exact_match}[name]
    expected = -sum(score(t, e.answers) for t, e in zip(texts, encoded, strict=True)) / len(texts)
    objective = GeneratedObjective(name, REWARDS[name], ObjectiveOptions(objective=name))
    assert objective.closure(lm, encoded, 0, range(5))().item() == pytest.approx(expected)
    assert expected < 0
    found = objective.measure(lm, encoded, 2)
    assert found.loss == pytest.approx(expected) and found.predictions == tuple(texts) and found.metric == "f1"


@torch.no_grad()
def sampled(lm, ids, seed, n, temperature=1.0, top_p=1.0):
    """Without a cache, one sequence; tokens are drawn by walking up the probabilities, in plain Python."""
    ids, start = list(ids), len(ids)
    for position in range(n):
        logits = lm.module(torch.tensor([ids]), use_cache=False).logits[0, -1].double() / temperature
        p = logits.softmax(0)
        order = sorted(range(len(p)), key=lambda i: -p[i])
        kept, total = set(), 0.0
        for i in order:
            if total >= top_p:
                break
            kept.add(i)
            total += float(p[i])
        weights = [float(p[i]) if i in kept else 0.0 for i in range(len(p))]
        left = (derive_seed(seed, position) >> 12) / 2**52 * sum(weights)
        token = next(i for i in range(len(p)) if left < sum(weights[: i + 1]))
        ids.append(token)
        if token == lm.tokenizer.eos_token_id:
            break
    return lm.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.sample(2)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.3, 1.0), (1.0, 0.5)])
def test_drawn_text_is_that_of_plain_sampling_whatever_the_batch(tiny, causal_family, temperature, top_p):
    lm = tiny(causal_family)
    prompts = [e.prompt for e in encode(lm)]
    seeds = (1, 2, 3, 4, 5)
    expected = [sampled(lm, p, s, 4, temperature, top_p) for p, s in zip(prompts, seeds, strict=True)]
    for cut in (1, 2, 5):
        found = []
        for lo in range(0, 5, cut):
            sampling = Sampling(temperature, top_p, seeds[lo : lo + cut])
            found += generate(lm, prompts[lo : lo + cut], 4, stops_at_newline=False, sampling=sampling)
        assert found == expected


def test_tokens_are_drawn_as_often_as_they_are_likely(tiny):
    lm, n = tiny("llama"), 4000
    with torch.no_grad():
        p = (lm.module(torch.tensor([[0, 70]])).logits[0, -1] * 30).softmax(0)
    sampling = Sampling(1 / 30, 1.0, tuple(range(n)))
    # The tokenizer is one of bytes: a text may stand for several tokens, so their probabilities are added.
    likely = {}
    for i, value in enumerate(p.tolist()):
        text = lm.tokenizer.decode([i], skip_special_tokens=True).strip()
        likely[text] = likely.get(text, 0.0) + value
    texts = generate(lm, [(0, 70)] * n, 1, stops_at_newline=False, sampling=sampling)
    assert max(likely.values()) < 0.9
    for text, value in likely.items():
        assert abs(texts.count(text) / n - value) < 5 * math.sqrt(value * (1 - value) / n) + 1e-3


def test_a_token_without_probability_is_never_drawn_whatever_the_number(monkeypatch):
    scores = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    for number, token in ((0.0, 1), (1 - 2**-52, 3)):
        monkeypatch.setattr(generation, "uniform", lambda seed, position, number=number: number)
        left = generation._Draw((1,), 2)(torch.zeros(1, 2), scores)
        assert left.argmax().item() == token and torch.isfinite(left).sum() == 1


def test_drawing_leaves_the_global_random_state_alone(tiny):
    lm = tiny("llama")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate(lm, [(0, 70)], 5, sampling=Sampling(1.0, 0.9, (7,)))
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_draws_differ_between_steps_seeds_and_rows_and_repeat_otherwise(tiny):
    lm = tiny("llama")
    encoded = encode(lm)

    def texts(step, seed=3, places=range(5)):
        objective = generated(seed=seed, **DRAWN)
        return [c.text for c in objective.completions(lm, encoded, objective._seeds(step, places))]

    first = texts(0)
    assert texts(0) == first
    assert texts(1) != first != texts(0, seed=4)
    # The same prompt twice in a batch is drawn for twice.
    assert first[1] != first[4]
    # A row's draws follow its place, not its neighbours.
    assert texts(0, places=[4, 3, 2, 1, 0])[2] == first[2]


@torch.no_grad()
def test_micro_batches_draw_what_the_whole_batch_draws(tiny, config, module, tmp_path):
    name = module("def r(batch):\n    return [sum(map(ord, c.text)) for c in batch]\n")
    values = []
    for k in (1, 2, 4):
        made = config(
            objective=f"{name}:r",
            **DRAWN,
            per_device_train_batch_size=8 // k,
            gradient_accumulation_steps=k,
            num_dev=0,
            output_dir=tmp_path / str(k),
        )
        lm = tiny("llama")
        rows = load_rows(lm, made)
        with closing(OutputFolder(made)) as output:
            closures, weights = Run(lm, rows, made, lm.score, output)._closures(rows.train[:8])
        assert len(closures) == k
        values.append(float(zo.accumulate(closures, weights)()))
    assert values == pytest.approx([values[0]] * 3)


@pytest.mark.parametrize("options", [{}, DRAWN])
@torch.no_grad()
def test_both_probes_see_the_same_completions_as_mu_vanishes(tiny, options):
    lm = tiny("llama", "float32")
    seen = []

    def remember(completions):
        seen.append([c.text for c in completions])
        return letters(completions)

    closure = generated(remember, **options).closure(lm, encode(lm), 0, range(5))
    estimate = central_difference(closure, ParameterSet(lm.module), [zo.Direction(1)], mu=1e-7)
    assert seen[0] == seen[1] and estimate.terms[0][0] == 0
    closure = generated(remember, **options).closure(lm, encode(lm), 0, range(5))
    central_difference(closure, ParameterSet(lm.module), [zo.Direction(1)], mu=0.1)
    assert seen[2] != seen[3]


@pytest.mark.sample(4)
@pytest.mark.parametrize("scheme", ["full", "lora", "prefix", "prompt"])
def test_a_probe_generates_as_the_model_with_moved_weights_does(tiny, causal_family, scheme):
    """Whether what is perturbed is kept or made anew at each token; an adapter is first moved off its start."""
    lm = tiny(causal_family)
    prepare_tuning(lm, TrainConfig.model_validate({"task": "sst2", "tuning": scheme}))
    tuned, u = ParameterSet(lm.module), zo.Direction(seed=2)
    with torch.no_grad():
        for t in tuned:
            t.parameter.add_(0.05)
    # Virtual tokens of models with random weights say little until they are far away, and little even then.
    sampling, a = Sampling(0.1, 1.0, (1, 2, 3, 4, 5)), 5.0 if lm.num_virtual_tokens else 0.2
    prompts = [e.prompt for e in encode(lm)]

    def texts():
        return generate(lm, prompts, 6, stops_at_newline=False, sampling=sampling)

    with probing(lm.module):
        at_x = texts()
        with zo.perturbed(tuned, u, a):
            found = texts()
        for t in tuned:
            t.parameter.add_(a * u.of(tuned, t.name))
        assert found == texts()
        # OPT's norms leave nothing of a prompt's size.
        assert found != at_x or (lm.config.model_type, scheme) == ("opt", "prompt")


@pytest.mark.sample(2)
@pytest.mark.parametrize("room", [0, 1 << 24])
@pytest.mark.parametrize("options", [{"tuning": "lora"}, {"tuning": "full"}], ids=lambda o: o["tuning"])
def test_text_from_kept_prompts_is_that_of_whole_passes(tiny, causal_family, options, room):
    """At x and in a probe; the lower layers see a prompt once if there is room, and new tokens always."""
    lm = tiny(causal_family)
    prepare_tuning(lm, TrainConfig.model_validate({"task": "sst2", "tuned_layers": 1, **options}))
    tuned, prompts = ParameterSet(lm.module), [e.prompt for e in encode(lm)]
    sampling = Sampling(1.0, 1.0, (1, 2, 3, 4, 5))
    reused = PromptCache(lm, ActivationStore([MemoryTier(room)]))
    slides = causal_family in ("mistral", "gemma3")
    assert (reused.depth, reused.num_layers) == (0 if slides else 1, 2)
    seen = []
    stack_of(lm.base)[1][0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    generator = torch.Generator().manual_seed(1)
    with probing(lm.module):
        for t in tuned:
            t.parameter.add_(0.1 * torch.randn(t.parameter.shape, generator=generator))
        for a in (0.0, 0.1, -0.1):
            with zo.perturbed(tuned, zo.Direction(1), a):
                expected = generate(lm, prompts, 6, stops_at_newline=False, sampling=sampling)
                seen.clear()
                found = generate(lm, prompts, 6, stops_at_newline=False, sampling=sampling, prefill=reused.prefill)
            assert found == expected
            # Two of the five prompts are the same.
            computed = 5 if not room else 4 if a == 0 else 0
            assert slides or sum(n > 1 for n in seen) == computed
    assert all("forward" not in vars(m) for m in lm.module.modules())


@torch.no_grad()
def greedy(lm, prompt, n):
    """The text of the best token at a time, by whole passes."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(lm.module(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == lm.tokenizer.eos_token_id:
            break
    return lm.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@pytest.mark.sample(2)
@pytest.mark.parametrize("scheme", ["prefix", "prompt"])
@pytest.mark.parametrize("drawn", [False, True])
def test_text_behind_virtual_tokens_is_that_of_plain_peft_whatever_the_batch(tiny, causal_family, scheme, drawn):
    """Each prompt alone, by a whole pass of peft's own forward for each token."""
    lm = tiny(causal_family)
    prepare_tuning(lm, TrainConfig.model_validate({"task": "squad", "tuning": scheme}))
    generator = torch.Generator().manual_seed(1)
    for p in lm.module.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=generator))
    encoded, seeds, n = encode(lm, PROMPTS[1:4]), (1, 2, 3), 4
    prompts = [e.prompt for e in encoded]
    if drawn:
        expected = [sampled(lm, p, s, n) for p, s in zip(prompts, seeds, strict=True)]
    else:
        expected = [greedy(lm, p, n) for p in prompts]
    for cut in (1, 3):
        found = []
        for lo in range(0, 3, cut):
            sampling = Sampling(1.0, 1.0, seeds[lo : lo + cut]) if drawn else None
            found += generate(lm, prompts[lo : lo + cut], n, stops_at_newline=False, sampling=sampling)
        assert found == expected
    objective = GeneratedObjective("f1", REWARDS["f1"], ObjectiveOptions(objective="f1"))
    assert objective.measure(lm, encoded, 3).predictions == objective.measure(lm, encoded, 1).predictions


def test_small_displaced_tensors_are_made_once_however_often_they_are_read(tiny, monkeypatch):
    lm = tiny("llama")
    prepare_tuning(lm, TrainConfig.model_validate({"task": "sst2", "tuning": "lora"}))
    tuned, u = ParameterSet(lm.module), zo.Direction(seed=2)
    moved = []
    real = perturb.OffsetAlong.move
    monkeypatch.setattr(perturb.OffsetAlong, "move", lambda self, *args: (moved.append(1), real(self, *args))[1])
    found = {}
    for limit in (1 << 24, 0):
        monkeypatch.setattr(limits, "CACHED_BYTES", limit)
        moved.clear()
        with probing(lm.module), zo.perturbed(tuned, u, 0.5):
            found[limit] = generate(lm, [(0, 70)], 8, stops_at_newline=False), len(moved)
    assert found[0][0] == found[1 << 24][0]
    # The second read makes what is kept.
    assert found[1 << 24][1] <= 2 * len(tuned) < found[0][1]


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", ZEROTH_ORDER)
@pytest.mark.parametrize(
    "options",
    [
        {"task": "sst2", "objective": "accuracy"},
        {"task": "squad", "objective": "f1"},
        {"task": "squad", "objective": "exact_match", "generation": "sample"},
        {"task": "copa", "objective": "FUNCTION", "tuning": "lora"},
    ],
    ids=lambda o: o["objective"],
)
def test_every_zeroth_order_method_trains_on_them(tmp_path, module, method, options):
    name = module("def r(batch):\n    return [len(set(c.text)) + c.prompt.count(c.reference) for c in batch]\n")
    options = {**options, "objective": options["objective"].replace("FUNCTION", f"{name}:r")}
    sizes = {"num_train": 4, "num_dev": 2, "num_eval": 2, "max_steps": 2, "per_device_train_batch_size": 2}
    short = {} if options["objective"] == "accuracy" else {"max_new_tokens": 3}
    made = TrainConfig(
        model="random:llama-tiny",
        device="cpu",
        method=method,
        max_length=450,
        mu=0.05,
        learning_rate=0.01,
        output_dir=tmp_path / "out",
        logging_steps=1,
        **sizes,
        **short,
        **options,
    )
    result = train(made)
    assert (result.num_steps, result.num_skipped) == (2, 0)
    assert result.dev.loss == pytest.approx(
        -(result.dev.exact_match if "exact" in made.objective else result.dev.value)
    )
    saved = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert saved["config"]["objective"] == made.objective and "predictions" not in saved["dev"]


def test_the_same_run_twice_gives_the_same_bits_and_blocks_reuse_nothing_of_other_texts(config, tmp_path, module):
    """Texts differ from probe to probe, so that activations of one are not those of another."""
    from safetensors.torch import load_file

    name = module("def r(batch):\n    return [sum(map(ord, c.text)) / 100 for c in batch]\n")
    options = {"objective": f"{name}:r", **DRAWN, "mu": 0.05, "learning_rate": 1e-3}
    for out in ("a", "b"):
        train(config(**options, output_dir=tmp_path / out))
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    result = train(config(**options, blocks="layer", output_dir=tmp_path / "c"))
    blocks = len(zo.blocks_by_layer(__import__("zotune.llm.models.load", fromlist=["load"]).load(config()).module))
    assert result.num_forwards <= 2 * 2 * blocks * 6 and result.num_forwards % 2 == 0


def test_probes_that_are_equal_are_no_fault_of_a_staircase_and_are_counted(config, tmp_path, module, capsys):
    name = module("def r(batch):\n    return [1.0] * len(batch)\n")
    result = train(config(objective=f"{name}:r", max_new_tokens=2, max_steps=3, rounding="nearest", dtype="bfloat16"))
    assert result.num_skipped == 0 and result.dev.reward == 1
    assert "3 steps without a difference" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["num_flat"] for line in lines] == [1, 2, 3]


def test_a_loss_with_a_slope_is_still_refused_where_probes_are_equal(tiny):
    optimizer = zo.zo_sgd(tiny("llama").module, 1e-3)
    flat = GradientEstimate(1.0, ((0.0, zo.Direction(1)),), 2)
    with pytest.raises(UsageError, match="both probes gave the same loss"):
        check_first_estimate(optimizer, flat, 1e-3)
    check_first_estimate(optimizer, flat, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fo_sgd"}, "has no gradient, which fo_sgd needs"),
        ({"method": "fo_adam"}, "has no gradient, which fo_adam needs"),
        ({"method": "forward_grad"}, "has no gradient, which forward_grad needs"),
        ({"hybrid_layers": 1}, "has no gradient, which a hybrid"),
    ],
)
@pytest.mark.parametrize("objective", ["accuracy", "rewards:length"])
def test_methods_that_differentiate_refuse_them_with_the_reason(config, options, message, objective):
    with pytest.raises(ValueError, match=message):
        config(objective=objective, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "acuracy"}, "Did you mean 'accuracy'"),
        ({"objective": "rewards:"}, "module:function"),
        ({"objective": "my rewards:f"}, "module:function"),
        ({"generation": "sample"}, "generation has no effect here"),
        ({"objective": "accuracy", "max_new_tokens": 5}, "max_new_tokens has no effect here"),
        ({"objective": "a:b", "temperature": 0.5}, "temperature has no effect here: it needs generation: sample"),
    ],
)
def test_objectives_that_do_not_exist_and_idle_options_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("model", "task", "options", "message"),
    [
        ("llama", "sst2", {"objective": "f1"}, "which these rows lack"),
        ("llama", "squad", {"objective": "accuracy"}, "each of these rows has a single answer"),
        ("roberta", "sst2", {"objective": "a:b"}, "is no causal model"),
    ],
)
def test_objectives_that_make_no_sense_for_rows_or_model_are_refused(tiny, model, task, options, message):
    made = DataOptions(task=task, num_train=2, num_dev=1, num_eval=1, max_length=300, **options)
    with pytest.raises(UsageError, match=message):
        load_rows(tiny(model), made)


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        ("[1.0]", r"returned 1 numbers for 2 completions"),
        ("[1.0, float('nan')]", r"returned nan \(float\) for the completion 'b' of the prompt 'q'"),
        ("[float('inf'), 1]", r"returned inf \(float\) for the completion 'a'"),
        ("[1.0, 'x']", r"returned 'x' \(str\)"),
        ("[1.0, None]", r"returned None \(NoneType\)"),
        ("1.0", r"returned 1.0 \(float\); it must return a list"),
        ("None", r"returned None"),
        ("'ab'", r"it must return a list"),
        ("1 / 0", r"failed on 2 completions, .*\.py, line 2: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_a_function_is_said_by_name_and_place(module, returns, message):
    name = module(f"def r(batch):\n    return {returns}\n")
    with pytest.raises(RunError, match=message) as error:
        checked_rewards(f"{name}:r", load_function(f"{name}:r", "objective"), [Completion(*"pa"), Completion(*"qb")])
    assert f"{name}:r" in str(error.value)


@pytest.mark.parametrize(
    "values",
    [[1, 2.5], (True, 2.5), np.array([1.0, 2.5]), torch.tensor([1.0, 2.5]), [np.float32(1), torch.tensor(2.5)]],
)
def test_any_numbers_will_do(values):
    assert checked_rewards("m:f", lambda batch: values, [Completion("p", "a")] * 2) == [1.0, 2.5]


def test_functions_that_cannot_be_imported_are_refused_with_what_to_do(module):
    with pytest.raises(UsageError, match=r"no module 'no_such_rewards'.*add it to PYTHONPATH"):
        load_function("no_such_rewards:f", "objective")
    name = module("def length(batch):\n    return [0.0] * len(batch)\n\nWORDS = 3\n")
    with pytest.raises(UsageError, match=r"has no function 'lenght'. Did you mean 'length'"):
        load_function(f"{name}:lenght", "objective")
    with pytest.raises(UsageError, match="has no function 'WORDS'"):
        load_function(f"{name}:WORDS", "objective")
    broken = module("import json\nraise LookupError('mine')\n")
    with pytest.raises(UsageError, match=r"importing .* failed, .*\.py, line 2: LookupError: mine"):
        load_function(f"{broken}:f", "objective")
    needs = module("import no_such_library\n")
    with pytest.raises(UsageError, match=r"importing .* failed, .*line 1: ModuleNotFoundError: .*no_such_library"):
        load_function(f"{needs}:f", "objective")


def test_a_recipe_names_the_function_and_rows_need_no_label(short, zotune, tmp_path, module):
    name = module(
        "def r(batch):\n    assert all(c.reference == '' for c in batch)\n    return [len(c.text) for c in batch]\n"
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in PROMPTS), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"objective: {name}:r\ntrain_file: prompts.jsonl\nmodel: random:llama-tiny\ndevice: cpu\nmax_new_tokens: 3\n"
        "max_steps: 2\nnum_dev: 2\noutput_dir: out\ntemplate: '{text}'\n",
        encoding="utf-8",
    )
    done = zotune("train", recipe)
    assert done.code == 0, done.err
    assert "evaluation rows" not in done.out and "% (" not in done.out
    assert read_recipe(tmp_path / "out/config.yaml")["objective"] == f"{name}:r"
    assert "| reward (95 % interval) | " in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    fail = zotune("train", recipe, "--objective", "no_such_rewards:f", "--overwrite-output-dir")
    assert fail.code == 2 and "no module 'no_such_rewards'" in fail.err
    args = ("eval", "--model", "random:llama-tiny", "--eval-file", "prompts.jsonl", "--objective", f"{name}:r")
    assert zotune(*args, "--device", "cpu", "--template", "{text}").out.startswith("reward ")


def test_a_function_that_fails_on_the_way_leaves_the_weights_of_the_last_step(config, tmp_path, module):
    name = module("calls = []\ndef r(batch):\n    calls.append(1)\n    return [1 / (5 - len(calls))] * len(batch)\n")
    with pytest.raises(RunError, match=f"{name}:r failed on 4 completions"):
        train(config(objective=f"{name}:r", max_new_tokens=2, num_dev=0, max_steps=9))
    assert (tmp_path / "out/model.safetensors").is_file()


def test_the_answer_to_compare_with_is_the_right_candidate_or_the_accepted_answers():
    squad = Example("Who?\nAnswer:", (" x\n",), 0, answers=("x", "the x"))
    assert open_ended(squad).answers == ("x", "the x") and open_ended(squad).candidates == ()
    assert Completion("p", "t").reference == "" and Completion("p", "t", ("a", "b")).reference == "a"
