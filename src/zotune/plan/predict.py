"""The prediction of the memory of one step of zotune's implementation, by parts, from the architecture alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zotune.errors import UsageError
from zotune.llm.checkpoints.no_code import read_config
from zotune.llm.config.schema import validate
from zotune.llm.data.collator import Batch
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.meta_model import load_meta_model, meta_model_from_config
from zotune.llm.models.random_models import ARCHITECTURES
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.models.tuned_sets.find import planned_aim
from zotune.llm.scoring.objectives import OBJECTIVES
from zotune.llm.training.optimizers import make_optimizer
from zotune.plan.formulas import Terms, terms_of
from zotune.plan.live_memory import FakeScalars, peak_of
from zotune.plan.memory import Memory, batch_of, overhead_bytes, recorded_bytes, state_bytes, weight_bytes
from zotune.plan.passes import Pass, largest_pass
from zotune.plan.placed import Places, placement_in_plan, with_placement
from zotune.plan.workload import Workload, synthetic_examples

# From ids on the Hugging Face Hub to the names of built-in architectures.
HUB_IDS = {
    **{f"facebook/{name}": name for name in ARCHITECTURES if name.startswith("opt-") and not name.endswith("tiny")},
    **{"roberta-large": "roberta-large", "FacebookAI/roberta-large": "roberta-large"},
    **{"meta-llama/Llama-2-7b-hf": "llama2-7b", "meta-llama/Llama-2-13b-hf": "llama2-13b"},
    **{"lmsys/vicuna-7b-v1.5": "vicuna-7b", "mistralai/Mistral-7B-v0.1": "mistral-7b"},
    **{"Qwen/Qwen3-0.6B": "qwen3-0.6b", "google/gemma-3-270m": "gemma3-270m"},
}


def predict(
    model: Any,
    method: str = "zo_sgd",
    tuning: str = "full",
    dtype: str = "auto",
    batch_size: int = 16,
    length: int = 128,
    **options: Any,
) -> Memory:
    """Predict the memory of one step from the architecture alone; weights are neither read nor allocated.

    Args:
        model: a value of `--model`, or a configuration of transformers.
        method: a value of `--method`.
        tuning: a value of `--tuning`.
        dtype: precision of the weights: float32, bfloat16 or float16; auto takes it from the configuration.
        batch_size: examples in one forward pass.
        length: tokens of each example.
        options: other options of `zotune.plan.workload.Workload`: objective, hybrid_layers, device, …

    Raises:
        UsageError: the model cannot be read, or an option is unknown or out of range.

    >>> zo, fo = (predict("random:opt-tiny", method, batch_size=4, length=64) for method in ("zo_sgd", "fo_sgd"))
    >>> zo.weights == fo.weights, zo.activations < fo.activations, zo.gradients
    (True, True, 0)
    """
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "") or "configuration"
    sizes = {"per_device_train_batch_size": batch_size, "length": length}
    values = {"model": name, "method": method, "tuning": tuning, "dtype": dtype, **sizes, **options}
    workload = validate(Workload, values, "predict")
    return Architecture(workload, None if isinstance(model, str) else model).predict(workload)


class Architecture:
    """A model on the `meta` device, prepared for one tuning scheme; the predictions of many workloads share it.

    Attributes:
        places: where the weights lie, and the largest state of the methods predicted so far; None if all lie on one
            device.

    Args:
        options: model, precision and tuning scheme; other options are ignored.
        config: a configuration of transformers, in place of the model's name.
    """

    def __init__(self, options: Workload, config: Any = None) -> None:
        models: list[tuple[LanguageModel, torch.dtype]] = []
        with FakeScalars():
            initial_peak = peak_of(lambda: models.append(_meta_model(options, config)))
            self.lm, stored = models[0]
            self._base_bytes = weight_bytes(self.lm)
            self._placement = placement_in_plan(options, self.lm.base, on_cpu=on_cpu(options))
            prepare_tuning(self.lm, options)
        self.places: Places | None = None
        self.weights = weight_bytes(self.lm)
        self._is_random = config is not None or options.model.startswith("random:")
        self._stored, self._initial_peak = stored, initial_peak
        self._passes: dict[Any, Pass] = {}

    def predict(self, workload: Workload) -> Memory:
        """The memory of one step of a workload of this model and tuning scheme."""
        device = "cpu" if on_cpu(workload) else "cuda"
        tuned = [p for p in self.lm.module.parameters() if p.requires_grad]
        with FakeScalars():
            ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
            aim = planned_aim(self.lm, workload)
            optimizer = make_optimizer(self.lm.module, workload, 0, lambda: self.lm.read(ids, ids), aim=aim)
            key = _key(workload)
            batch = self.batch(workload)
            if key not in self._passes:
                self._passes[key] = largest_pass(self.lm, optimizer, workload, batch, device)
            state = state_bytes(optimizer, workload)
        for p in tuned:  # a hybrid may have frozen some of them
            p.requires_grad_(True)
        largest = self._passes[key]
        memory = Memory(
            weights=self.weights,
            loading=self.loading,
            state=state,
            gradients=largest.gradients,
            activations=largest.activations,
            scratch=largest.scratch,
            reused=recorded_bytes(self.lm, batch, workload),
            overhead=overhead_bytes(optimizer, device),
        )
        if self._placement is not None:
            memory, places = with_placement(memory, self._placement, tuned, workload, self._stored)
            if self.places is None or places.state > self.places.state:
                self.places = places
        return memory

    def terms(self, workload: Workload) -> Terms:
        """The terms of the paper's formulas for a workload."""
        return terms_of(self.lm, self.batch(workload))

    def batch(self, workload: Workload) -> Batch:
        """The batch of one forward pass: a single example, repeated."""
        one = synthetic_examples(
            workload.model_copy(update={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}), self.lm
        )
        return batch_of(self.lm, one * workload.per_device_train_batch_size, OBJECTIVES[workload.objective])

    @property
    def loading(self) -> int:
        """Bytes besides the weights while these are initialised, or read in the checkpoint's precision."""
        if self._is_random:
            return max(0, self._initial_peak - self._base_bytes)
        base = list(self.lm.base.parameters())
        is_converted = any(p.dtype != self._stored for p in base)
        return sum(p.numel() for p in base) * self._stored.itemsize if is_converted else 0


def on_cpu(workload: Workload) -> bool:
    """Whether the workload would run on the CPU."""
    return workload.device == "cpu" or (workload.device == "auto" and not torch.cuda.is_available())


def _key(workload: Workload) -> Any:
    """The options that the passes depend on; the zeroth-order methods without tangents share one entry."""
    kinds = ("forward_grad", "fo_sgd", "fo_adam", "grzo")
    method = workload.method if workload.method in kinds else "zo_sgd"
    names = (
        "per_device_train_batch_size",
        "length",
        "objective",
        "gradient_checkpointing",
        "num_queries",
        "difference",
        *("directions_per_batch", "flipped", "rank", "activation_rank"),
    )
    more = ("gradient_accumulation_steps", "hybrid_layers", "hybrid_method", "hybrid_tied", "device")
    return (method, *(getattr(workload, name) for name in (*names, *more)))


def _meta_model(options: Workload, config: Any) -> tuple[LanguageModel, torch.dtype]:
    if config is not None:
        return meta_model_from_config(options, config)
    if options.model in HUB_IDS:
        return meta_model_from_config(options, ARCHITECTURES[HUB_IDS[options.model]]())
    folder = Path(options.model)
    if (folder / "config.json").is_file():
        return meta_model_from_config(options, _config_of(folder))
    return load_meta_model(options)


def _config_of(folder: Path) -> Any:
    try:
        return read_config(folder)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{folder}/config.json does not describe a model that transformers knows: {str(error).splitlines()[0]}"
        ) from None
