"""Finding the aim of a tuned set, by forward passes over training rows or from the weights.

- `lora_init: eva`: A of LoRA, the principal components of each layer's inputs, by peft (Paischer et al., 2024).
- `activation_rank`: directions within the leading components of what a tensor multiplies (AGZO).
- `direction_scale: inputs`: directions' entries over the root mean square of what they multiply.
- `tuning: lora_xs`: A = V_rᵀ, and B within the columns of U_r Σ_r, of W = U Σ Vᵀ (Bałazy et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zotune.directions.input_scaled import input_scales, planned_scales
from zotune.directions.principal import LeadingVectors, Rows, is_norm, planned_subspaces, principal_subspaces
from zotune.directions.samplers import Subspace
from zotune.errors import UsageError, is_out_of_memory, reason_of
from zotune.llm.config.step import StepOptions
from zotune.llm.data.collator import Batch, collate
from zotune.llm.data.tokenization import Candidate, Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.tuned_sets.adapters import lora_layers
from zotune.llm.models.tuned_sets.aim import Aim
from zotune.llm.quantized.backends import is_packed, supports_row_lookup
from zotune.messages import say
from zotune.model.layers import stack_of
from zotune.model.parameters import ParameterSet
from zotune.model.wrappers import without_wrappers

NUM_ROWS, _ROWS_A_PASS = 64, 8
"""Training rows that are read to find an aim: as many, at equal distances."""
# Passes after which EVA's components have to agree with those of the pass before.
_MOST_PASSES = 400
# Passes of power iteration over a weight, which cost no pass of the model.
_TURNS = 16


def needs_aim(options: StepOptions) -> bool:
    """Whether a run finds something before its first step."""
    of_set = options.tuning == "lora_xs" or options.lora_init == "eva"
    return of_set or options.activation_rank is not None or options.direction_scale == "inputs"


def find_aim(lm: LanguageModel, options: StepOptions, rows: Sequence[Encoded]) -> Aim:
    """Find the aim of a run; the model's tuned parameters are chosen already.

    Args:
        lm: the model; its weights stay as they are.
        options: of the run.
        rows: the training rows, of which some are read.

    Raises:
        UsageError: nothing can be found with this model, or it is too large for a ledger.
    """
    if options.tuning == "lora_xs":
        aim = _singular(lm)
    else:
        chosen = [rows[i * len(rows) // NUM_ROWS] for i in range(NUM_ROWS)] if len(rows) > NUM_ROWS else list(rows)
        batches = [_batch(lm, chosen[lo : lo + _ROWS_A_PASS]) for lo in range(0, len(chosen), _ROWS_A_PASS)]
        passes = lm.num_forwards
        values = _eva(lm, batches) if options.lora_init == "eva" else {}
        run, read, in_scores = _reading(lm, batches)
        rank, is_scaled = options.activation_rank, options.direction_scale == "inputs"
        spaces = {} if rank is None else principal_subspaces(lm.module, run, rank, rows=in_scores)
        scales = input_scales(lm.module, run, rows=read) if is_scaled else {}
        aim, lm.num_forwards = Aim(values, spaces, scales), passes
        say(f"{len(chosen)} training rows were read before the first step, to aim what is tuned at what it reads")
    aim.check_size()
    return aim


def planned_aim(lm: LanguageModel, options: StepOptions) -> Aim | None:
    """The aim of a model without weights: subspaces of the right size on `meta`; None where a run finds none."""
    if not needs_aim(options):
        return None
    if options.tuning == "lora_xs":
        shapes = {name_of_b(name, layer): b.weight.shape for name, _, b, layer in lora_layers(lm.module)}
        return Aim({}, {n: Subspace(0, torch.empty(shape, device="meta"), None) for n, shape in shapes.items()})
    rank, tuned = options.activation_rank, ParameterSet(lm.module)
    scales = planned_scales(tuned) if options.direction_scale == "inputs" else {}
    return Aim({}, {} if rank is None else planned_subspaces(tuned, rank), scales)


def set_aim(lm: LanguageModel, aim: Aim | None) -> None:
    """Give a model what was found for its tuned set: initial values, and the subspaces that directions lie in.

    Raises:
        UsageError: a value has no place, so that it is of another model.
    """
    lm.aim = aim
    parameters = dict(lm.module.named_parameters())
    for name, value in ({} if aim is None else aim.values).items():
        p = parameters.get(name)
        if p is None or p.shape != value.shape:
            raise UsageError(f"the initial values of {name!r} were found for another model than {lm.name}.")
        with torch.no_grad():
            p.copy_(value)


def _batch(lm: LanguageModel, rows: Sequence[Encoded]) -> Batch:
    """The rows as the run scores them; where text is generated, their prompts."""
    last = {len(e.prompt): Candidate(0, (len(e.prompt) - 1,), (0,)) for e in rows}
    as_read = [e if e.candidates else Encoded((e.prompt,), (last[len(e.prompt)],), 0) for e in rows]
    # Where there is nothing to choose from, all tokens of the only text count, and their normalisers too.
    return collate(as_read, lm.pad_token_id, lm.device, exact=any(len(e.candidates) < 2 for e in rows))


def _reading(lm: LanguageModel, batches: Sequence[Batch]) -> tuple[Callable[[], None], Rows, Rows]:
    """What scores some rows, the rows of what a module reads that count in it, and these as they enter the scores."""
    now: list[Batch] = []
    inside = {m for layer in stack_of(lm.base)[1] for m in layer.modules()}
    before_head = _norm_before_head(lm, batches)

    def read(module: nn.Module, x: Tensor) -> Tensor:
        """Of the layers' inputs those of tokens, of what comes after them those of scored positions."""
        batch, flat = now[-1], x.reshape(-1, x.shape[-1])
        if x.shape[:-1] == batch.input_ids.shape:
            flat = flat[batch.attention_mask.view(-1).bool() if module in inside else batch.positions]
        return flat

    def in_scores(module: nn.Module, x: Tensor) -> Tensor:
        return _in_scores(lm, now[-1], read(module, x)) if module is before_head else read(module, x)

    def run() -> None:
        for batch in batches:
            now[:] = [batch]
            lm.score(batch)

    return run, read, in_scores


def _norm_before_head(lm: LanguageModel, batches: Sequence[Batch]) -> nn.Module | None:
    """The norm whose output the head reads as it is; None where there is none, or scores need more than its logits."""
    head = lm.base.get_output_embeddings()
    suffices = not lm.classifies and all(batch.needs_only_candidates for batch in batches)
    if not suffices or not supports_row_lookup(head) or is_packed(head.weight):
        return None
    seen: dict[nn.Module, Tensor] = {}
    last: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda module, args, output: seen.update({module: output}))
        for m in lm.base.modules()
        if is_norm(m)
    ]
    hooks.append(head.register_forward_pre_hook(lambda module, args: last.append(args[0])))
    try:
        with torch.no_grad():
            lm.logits(batches[0])
    finally:
        for hook in hooks:
            hook.remove()
    return next((m for m, own in seen.items() if last and torch.equal(own, last[-1])), None)


def _in_scores(lm: LanguageModel, batch: Batch, x: Tensor) -> Tensor:
    """What the gain g of the norm before the head multiplies in the candidates' scores.

    Logit c is Σ_k g_k (w_c ⊙ x)_k with row w_c of the head, and of an example's logits only differences count: the rows
    are (w_c - mean w) ⊙ x, in whose span the gradient of g lies.
    """
    weight: Tensor = lm.base.get_output_embeddings().weight.detach()[batch.tokens].to(x.dtype)
    sums = torch.zeros_like(x).index_add_(0, batch.rows, weight)
    counts = torch.bincount(batch.rows, minlength=len(x)).clamp(min=1)[:, None]
    return (weight - (sums / counts)[batch.rows]) * x[batch.rows]


def _eva(lm: LanguageModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """EVA by peft, with the same rank for all layers, so that the adapter's size is as configured."""
    from peft import initialize_lora_eva_weights

    module: Any = lm.module
    targets = module.active_peft_config.target_modules
    inputs = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches]
    num_passes, is_tuned = 0, {name: p.requires_grad for name, p in lm.module.named_parameters()}

    def run(module: nn.Module, batch: Mapping[str, Tensor]) -> None:
        nonlocal num_passes
        if (num_passes := num_passes + 1) > _MOST_PASSES:
            raise UsageError(
                f"lora_init: eva: the components of the layers' inputs did not settle in {_MOST_PASSES} passes. Take a "
                "lower --lora-r, or leave out --lora-init."
            )
        lm.read(batch["input_ids"], batch["attention_mask"])

    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            torch.manual_seed(0)
            initialize_lora_eva_weights(
                lm.module, inputs, forward_fn=run, gather_distributed_inputs=False, show_progress_bar=False
            )
    except UsageError:
        raise
    except Exception as error:  # peft's own, of any kind
        if is_out_of_memory(error):
            raise
        raise UsageError(f"lora_init: eva: peft finds no components for {lm.name}: {reason_of(error)}") from error
    lm.module.eval()
    # peft has run the passes without the adapter, and then let all of it require a gradient.
    for name, p in lm.module.named_parameters():
        p.requires_grad_(is_tuned[name])
    module.active_peft_config.target_modules = targets  # where peft has named each layer by its path
    return {n: p.detach().clone() for n, p in lm.module.named_parameters() if ".lora_A." in n}


def name_of_b(name: str, layer: Any) -> str:
    """The canonical name of the B of an adapted layer."""
    return without_wrappers(f"{name}.lora_B.{layer.active_adapter[0]}.weight")


def _singular(lm: LanguageModel) -> Aim:
    """LoRA-XS: the leading right singular vectors V of each adapted weight, and W V = U Σ."""
    values: dict[str, Tensor] = {}
    spaces: dict[str, Subspace] = {}
    for name, a, _, layer in lora_layers(lm.module):
        base: Any = layer.get_base_layer()
        if is_packed(base.weight) or base.weight.is_meta:
            raise UsageError(
                f"tuning: lora_xs takes the singular vectors of {name}, whose values are "
                f"{'packed integers' if is_packed(base.weight) else 'offloaded'}. Tune lora or lora_fa, or load the "
                "model whole and without --quantization."
            )
        # GPT-2 holds its weights as (inputs, outputs).
        weight = base.weight.detach().t() if layer.fan_in_fan_out else base.weight.detach()
        rank = a.weight.shape[0]
        if rank > min(weight.shape):
            raise UsageError(
                f"tuning: lora_xs: {name} is {weight.shape[0]} x {weight.shape[1]}, so it has at most "
                f"{min(weight.shape)} singular vectors, fewer than lora_r: {rank}. Give a lower one."
            )
        found = LeadingVectors(weight.shape[1], rank, weight.device)
        for _ in range(_TURNS):
            found.add(weight)
            found.turn()
        values[f"{name}.lora_A.{layer.active_adapter[0]}.weight"] = found.found.t().contiguous()
        spaces[name_of_b(name, layer)] = Subspace(0, (weight.double() @ found.found.double()).float(), None)
    return Aim(values, spaces)
