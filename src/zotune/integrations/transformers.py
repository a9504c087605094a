"""Any `transformers.Trainer` tunes by forward passes: the Trainer keeps everything but the gradient and the step.

    class MyZOTrainer(ZerothOrderMixin, MyTrainer): ...

Data, schedule, logging, evaluation, checkpoints, callbacks and resuming are the Trainer's. Its `training_step` is
called once a micro-batch. Here it keeps the micro-batches until they are one batch, and then takes one step of a
zeroth-order optimizer, whose objective is the Trainer's own `compute_loss` of that batch.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from zotune.apply.tensor_update import HALF
from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate
from zotune.integrations.accelerate import averaged, copy_from_first
from zotune.integrations.model_card import TAGS, name_the_optimizer, with_tags
from zotune.integrations.stepped_optimizer import SteppedOptimizer
from zotune.integrations.trainer_checks import check_loss, check_trainer
from zotune.llm.config.method import FIRST_ORDER, OF_METHOD, MethodOptions, default_mu
from zotune.llm.config.rates import warnings
from zotune.llm.config.schema import validate
from zotune.llm.training.optimizers import make_optimizer
from zotune.llm.training.step import check_first_estimate, check_mu
from zotune.optim.zeroth_order import ZerothOrder

if TYPE_CHECKING:
    from transformers import Trainer as _AnyTrainer
else:
    _AnyTrainer = object

_LOGGER = logging.getLogger(__name__)
# Of the method's options these are the Trainer's too; a hybrid back-propagates, which is no forward pass.
_SHARED = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_TRAINERS = {f.name for f in fields(TrainingArguments)}
# A Trainer's loss is the mean of a batch, of which a direction an example needs each example's own.
_OF_EXAMPLES = ("directions_per_batch", "flipped")
_OWN = [n for n in MethodOptions.model_fields if n not in (*_TRAINERS, *_OF_EXAMPLES) and not n.startswith("hybrid_")]
# What TRL's trainers count in `compute_loss`, which runs several times a step.
_COUNTERS = ("_total_train_tokens",)


def _argument(name: str) -> tuple[str, Any, Any]:
    option = MethodOptions.model_fields[name]
    text = (option.description or "").replace("%", "%%")  # for argparse
    if option.default_factory is not None:  # μ, whose default depends on what is tuned
        return name, option.annotation | None, field(default=None, metadata={"help": text})  # type: ignore[operator]
    return name, option.annotation, field(default=option.default, metadata={"help": text})


ZerothOrderArguments: Any = make_dataclass("ZerothOrderArguments", [_argument(name) for name in _OWN])
ZerothOrderArguments.__module__ = __name__
ZerothOrderArguments.__doc__ = """The options of the method, `method`, `mu`, `num_queries`, …, for training arguments.

They have the names, defaults and checks of `zotune train`. Put this first among the bases:

    @dataclass
    class MyZOConfig(ZerothOrderArguments, MyConfig): ...

`learning_rate`, `weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon` and `seed` are the Trainer's own.
"""


class ZerothOrderMixin(_AnyTrainer):  # type: ignore[misc]
    """Makes a subclass of `transformers.Trainer` tune by forward passes; it comes first among the bases.

    The options of the method are read from the training arguments, see `ZerothOrderArguments`; if these have none,
    each option has its default. Or give an optimizer of zotune: `optimizers=(zo.zo_adam(model, lr=1e-4), None)`.

    The objective is the loss of all micro-batches of a step, over all processes, normalised as the Trainer does it
    for a gradient. Modules are in eval mode meanwhile (no dropout). The loss that is logged is the mean over the
    step's probes.

    Raises, when `train` begins:
        UsageError: an option is out of range, or what the Trainer is asked for needs gradients, see
            `zotune.integrations.trainer_checks`.
    """

    optimizer: Any
    _method = "an optimizer"

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the zeroth-order optimizer, and `self.optimizer` for the Trainer; called when training begins."""
        check_trainer(self, ZerothOrderMixin)
        if hasattr(self.model, "add_model_tags"):  # peft writes them into an adapter's card
            self.model.add_model_tags(list(TAGS))
        self._micro_batches: list[Any] = []
        # As for evaluation: not within DistributedDataParallel, which would take memory for gradients. Old versions of
        # accelerate wrap it nevertheless, so the loss is that of `self.model`.
        self.accelerator.prepare_model(self.model, evaluation_mode=True)
        copy_from_first(self.accelerator, self.model)
        if self.optimizer is None:
            self._mu, optimizer = _optimizer_of(self.args, self.model)
            self._method = getattr(self.args, "method", MethodOptions.model_fields["method"].default)
            self.optimizer = self._stepped = SteppedOptimizer(optimizer)
        elif isinstance(self.optimizer, ZerothOrder):
            self._mu, self._stepped = None, SteppedOptimizer(self.optimizer)
            self.optimizer = self._stepped
        return self.optimizer  # type: ignore[no-any-return]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Keep a micro-batch; with the last one of a step, take the step.

        Returns:
            The loss before the step, shape (), the same in every process; 0 for a micro-batch that is kept.
        """
        model.train()  # when they log, trainers tell training from evaluation by it; probes are in eval mode
        self._micro_batches.append(self._prepare_inputs(inputs))
        loss = 0.0
        if self.accelerator.sync_gradients:
            # Not those before: an epoch that a callback ends early may leave some behind.
            batch = self._micro_batches[-self.current_gradient_accumulation_steps :]
            self._micro_batches = []
            loss = self._take_step(batch, num_items_in_batch)
        return torch.tensor(loss, device=self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, without `grad_norm`: there are no gradients, so it would be 0."""
        logs.pop("grad_norm", None)
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, tags: Any = None, **kwargs: Any) -> None:
        """As the Trainer's; its tags name zotune, and its hyper-parameters the method."""
        super().create_model_card(*args, tags=with_tags(tags), **kwargs)
        if self.is_world_process_zero():
            name_the_optimizer(Path(self.args.output_dir) / "README.md", self._method)

    def _take_step(self, batch: Sequence[Any], num_items: Tensor | int | None) -> float:
        optimizer, has_steps = self._stepped.optimizer, False
        counters = {name: getattr(self, name) for name in _COUNTERS if hasattr(self, name)}

        def objective() -> Tensor:
            nonlocal has_steps
            for name, value in counters.items():
                setattr(self, name, value)
            losses = [self._loss_of(inputs, num_items) for inputs in batch]
            has_steps = not all(isinstance(loss, Tensor) for loss in losses)
            values = torch.stack([torch.as_tensor(loss, device=self.args.device).double() for loss in losses])
            return averaged(self.accelerator, values if self._is_scaled(num_items) else values / len(batch))

        def check(estimate: GradientEstimate) -> None:
            check_first_estimate(optimizer, estimate, mu=None if has_steps else self._mu)

        is_first, skipped = not optimizer.num_steps, optimizer.num_skipped
        if is_first and self._mu is not None:
            check_mu(optimizer.tuned, self._mu)
        loss = self._stepped.take_step(objective, check if is_first else None)
        if optimizer.num_skipped > skipped:
            _LOGGER.warning("step %d was skipped: its loss was NaN or infinite.", optimizer.num_steps)
        return loss

    def _loss_of(self, inputs: Any, num_items: Tensor | int | None) -> Any:
        """The Trainer's loss of a micro-batch; a number if it has no derivative."""
        inputs = copy.copy(inputs)  # which the Trainer may change
        with self.compute_loss_context_manager(), _metrics_of_training(self):
            loss = self.compute_loss(self.model, inputs, num_items_in_batch=num_items)
        check_loss(loss)
        return loss

    def _is_scaled(self, num_items: Tensor | int | None) -> bool:
        """Whether the losses of a step's micro-batches add up to the step's; else it is their mean."""
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None


@contextmanager
def _metrics_of_training(trainer: Any) -> Iterator[None]:
    """TRL's trainers file metrics by the mode of the model's outermost module; those within it stay in eval mode."""
    before = trainer.model.training
    trainer.model.training = before or hasattr(trainer, "_metrics")
    try:
        yield
    finally:
        trainer.model.training = before


class _TrainerOptions(MethodOptions):
    """The options of the method, and what is tuned, on which their defaults and ranges depend."""

    tuning: str = "full"


def _tuning_of(model: nn.Module) -> str:
    """The tuning scheme of a model: that of its adapter, or full."""
    adapter = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    if adapter is None:
        return "full"
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower().removesuffix("_tuning")
    return kind if kind in ("lora", "prefix", "prompt") else "peft"


def _optimizer_of(args: Any, model: nn.Module) -> tuple[float | None, ZerothOrder]:
    """μ, if the method has one, and the optimizer that training arguments name.

    Raises:
        UsageError: an option is out of range or has no effect, or the method back-propagates.
    """
    given = {name: getattr(args, name) for name in (*_OWN, *_SHARED) if getattr(args, name, None) is not None}
    # A default is not given: some methods have another one.
    for name in OF_METHOD.get(given.get("method", ""), {}):
        if given.get(name) == MethodOptions.model_fields[name].default:
            given.pop(name, None)
    tuning = _tuning_of(model)
    values = {"mu": default_mu(tuning), **given}
    options = validate(_TrainerOptions, values, type(args).__name__).model_copy(update={"tuning": tuning})
    if options.method in FIRST_ORDER:
        raise UsageError(
            f"method is {options.method}, which back-propagates: use the Trainer without ZerothOrderMixin."
        )
    tuned = [p for p in model.parameters() if p.requires_grad]
    half_precision = any(p.dtype in HALF for p in tuned)
    for warning in warnings(options, sum(p.numel() for p in tuned), half_precision=half_precision, search=""):
        _LOGGER.warning("%s.", warning)
    # What a Trainer's loss runs is unknown, so no activation of it is used again.
    optimizer = make_optimizer(model, options, args.seed, reuse_prefix=False)
    assert isinstance(optimizer, ZerothOrder)
    return None if options.method == "forward_grad" else options.mu, optimizer


@dataclass
class ZOTrainingArguments(ZerothOrderArguments, TrainingArguments):  # type: ignore[misc]
    """`transformers.TrainingArguments` with the options of the method."""


class ZOTrainer(ZerothOrderMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` by forward passes; see `ZerothOrderMixin`."""
