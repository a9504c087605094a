"""Our own prediction: what one step of our implementation takes, by parts, from the architecture alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zotune.errors import UsageError
from zotune.llm.config.schema import validate
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.meta_model import load_meta_model, meta_model_from_config
from zotune.llm.models.random_models import ARCHITECTURES
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.scoring.objectives import OBJECTIVES
from zotune.llm.training.optimizers import make_optimizer
from zotune.plan.formulas import Terms, terms_of
from zotune.plan.live_memory import Assumed, peak_of
from zotune.plan.memory import Memory, copies_of, overhead_bytes, recorded_bytes, state_bytes, weight_bytes
from zotune.plan.passes import Copies, Pass, largest_pass
from zotune.plan.workload import Workload, made_up

# Architectures that are known here, by the ids that the Hub has them under.
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
    """The memory of one step, from the architecture alone: no weight is read, and none is made.

    Args:
        model: a name as `--model` takes it, or a configuration of transformers.
        method: as `--method`.
        tuning: as `--tuning`.
        dtype: of the weights: float32, bfloat16, float16; auto is the configuration's.
        batch_size: examples in one forward pass.
        length: tokens of each.
        options: any other of `zotune.plan.workload.Workload`: objective, hybrid_layers, device, …

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
    """A model without its numbers, prepared for one tuning scheme: predictions of many workloads share it.

    Args:
        options: model, precision and tuning scheme; of the rest nothing is used.
        config: a configuration of transformers, in place of the model's name.
    """

    def __init__(self, options: Workload, config: Any = None) -> None:
        made: list[tuple[LanguageModel, torch.dtype]] = []
        with Assumed():
            making = peak_of(lambda: made.append(_skeleton(options, config)))
            self.lm, stored = made[0]
            self._stays = weight_bytes(self.lm)
            prepare_tuning(self.lm, options)
        self.weights = weight_bytes(self.lm)
        self._is_random = config is not None or options.model.startswith("random:")
        self._stored, self._making = stored, making
        self._passes: dict[Any, Pass] = {}

    def predict(self, workload: Workload) -> Memory:
        """The memory of one step of a workload of this model and tuning scheme."""
        device = "cpu" if on_cpu(workload) else "cuda"
        tuned = [p for p in self.lm.module.parameters() if p.requires_grad]
        with Assumed():
            ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
            optimizer = make_optimizer(self.lm.module, workload, 0, lambda: self.lm.read(ids, ids))
            key = _key(workload)
            batch = self.batch(workload)
            if key not in self._passes:
                self._passes[key] = largest_pass(self.lm, optimizer, workload, batch, device)
            state = state_bytes(optimizer, workload)
        for p in tuned:  # of which a hybrid may have frozen some
            p.requires_grad_(True)
        takes = self._passes[key]
        return Memory(
            weights=self.weights,
            loading=self.loading,
            state=state,
            gradients=takes.gradients,
            activations=takes.activations,
            scratch=takes.scratch,
            reused=recorded_bytes(self.lm, batch(1), workload),
            overhead=overhead_bytes(optimizer, device),
        )

    def terms(self, workload: Workload) -> Terms:
        """The terms of the paper's formulas."""
        return terms_of(self.lm, self.batch(workload)(1))

    def batch(self, workload: Workload) -> Copies:
        """The batch of one forward pass: one example, so often."""
        one = made_up(
            workload.model_copy(update={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}), self.lm
        )
        return copies_of(self.lm, one * workload.per_device_train_batch_size, OBJECTIVES[workload.objective])

    @property
    def loading(self) -> int:
        """Bytes beside the weights while these are made (random ones) or read (in the checkpoint's precision)."""
        if self._is_random:
            return max(0, self._making - self._stays)
        base = list(self.lm.base.parameters())
        is_other = any(p.dtype != self._stored for p in base)
        return sum(p.numel() for p in base) * self._stored.itemsize if is_other else 0


def on_cpu(workload: Workload) -> bool:
    """Whether it would run there."""
    return workload.device == "cpu" or (workload.device == "auto" and not torch.cuda.is_available())


def _key(workload: Workload) -> Any:
    """What the passes depend on: of zeroth-order methods only whether they carry tangents."""
    kinds = ("forward_grad", "fo_sgd", "fo_adam")
    method = workload.method if workload.method in kinds else "zo_sgd"
    names = (
        "per_device_train_batch_size",
        "length",
        "objective",
        "gradient_checkpointing",
        "num_queries",
        "difference",
    )
    more = ("gradient_accumulation_steps", "hybrid_layers", "hybrid_method", "hybrid_tied", "device")
    return (method, *(getattr(workload, name) for name in (*names, *more)))


def _skeleton(options: Workload, config: Any) -> tuple[LanguageModel, torch.dtype]:
    if config is not None:
        return meta_model_from_config(options, config)
    if options.model in HUB_IDS:
        return meta_model_from_config(options, ARCHITECTURES[HUB_IDS[options.model]]())
    folder = Path(options.model)
    if (folder / "config.json").is_file():
        return meta_model_from_config(options, _config_of(folder))
    return load_meta_model(options)


def _config_of(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{folder}/config.json is of no model that transformers knows: {str(error).splitlines()[0]}"
        ) from None
