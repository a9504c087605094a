"""What a Trainer may be asked for that has no meaning without gradients: refused by name, with what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import Trainer

from zotune.apply.tensor_update import HALF
from zotune.errors import UsageError
from zotune.optim.zeroth_order import ZerothOrder

_LOGGER = logging.getLogger(__name__)
# Their `training_step` only moves stored activations to the host, of which forward passes have none.
_SAME_STEP = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer")


def check_trainer(trainer: Any, mixin: type) -> None:
    """Refuse arguments, wrappers and trainers that need gradients, or that would have no effect.

    Args:
        trainer: a `transformers.Trainer` with `mixin` among its bases.
        mixin: the class whose `training_step` takes the place of theirs.

    Raises:
        UsageError: with all reasons, each with what to do.
    """
    found = [*_wrappers(trainer), *_arguments(trainer), *_objective(trainer), *_steps(trainer, mixin)]
    if found:
        raise UsageError(f"{type(trainer).__name__} tunes by forward passes. " + " ".join(found))
    if getattr(trainer, "calculate_KL", False):
        _LOGGER.warning(
            "the loss of KTO holds its KL term constant for a gradient; by forward passes the term varies with the "
            'weights. loss_type="apo_zero_unpaired" has no such term.'
        )
    if is_set(trainer.args, "gradient_checkpointing"):
        _LOGGER.warning("gradient checkpointing has no effect: forward passes store no activations.")


def is_set(args: Any, name: str) -> bool:
    """Whether an argument has a value, and one that differs from the default of its class.

    >>> from transformers import TrainingArguments
    >>> is_set(TrainingArguments("out", use_cpu=True), "max_grad_norm")
    False
    """
    value = getattr(args, name, None)
    return bool(value) and value != next(f.default for f in fields(args) if f.name == name)


def check_loss(loss: Any) -> None:
    """Refuse a loss in half precision, whose differences are mostly rounding.

    Raises:
        UsageError: it is one.
    """
    if isinstance(loss, Tensor) and loss.dtype in HALF:
        raise UsageError(
            f"the Trainer's loss is {loss.dtype}, too coarse for differences of losses. Compute it from "
            "outputs.logits.float() (compute_loss_func, or a compute_loss of your own), or load the model in float32."
        )


def _wrappers(trainer: Any) -> Iterator[str]:
    if trainer.is_deepspeed_enabled:
        yield (
            "DeepSpeed shards gradients and steps by itself; leave deepspeed out: processes exchange losses alone, and "
            "each holds the model."
        )
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        yield "FSDP shards the weights that a probe has to read whole; leave fsdp out, or use zotune train."
    if getattr(trainer.args, "parallelism_config", None) is not None or getattr(
        trainer, "is_distributed_loading_by_transformers", False
    ):
        yield "Tensor, context and sequence parallelism shard the model or a row; leave them out."
    if trainer.args.n_gpu > 1:
        yield (
            f"{trainer.args.n_gpu} GPUs in one process would run copies of the model (nn.DataParallel). Start one "
            "process a GPU, torchrun --nproc-per-node N script.py, or show one: CUDA_VISIBLE_DEVICES=0."
        )
    if trainer.args.fp16 or getattr(trainer.accelerator, "scaler", None) is not None:
        yield (
            "fp16=True scales the loss for back-propagation (GradScaler). Use bf16=True, or leave both out and load "
            "the model with dtype=torch.float16."
        )


def _arguments(trainer: Any) -> Iterator[str]:
    args = trainer.args
    if is_set(args, "max_grad_norm"):
        yield (
            f"max_grad_norm={args.max_grad_norm:g} clips gradients, of which there are none; leave it out. "
            "max_coefficient limits the directional derivatives."
        )
    for name in ("optim", "optim_args", "optim_target_modules"):
        if is_set(args, name):
            yield f"{name} would not be used; leave it out: method, mu and the other options choose the optimizer."
    if trainer.optimizer_cls_and_kwargs is not None:
        yield "optimizer_cls_and_kwargs would not be used; leave it out, or give optimizers=(zo.zo_sgd(…), None)."
    optimizer = trainer.optimizer
    while optimizer is not None and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if optimizer is not None and not isinstance(optimizer, ZerothOrder):
        yield (
            f"optimizers holds {type(optimizer).__name__}, which needs gradients. Leave it out, or give one of "
            "zotune's, such as zo.zo_sgd(model, lr=1e-6)."
        )
    if args.neftune_noise_alpha is not None:
        yield "neftune_noise_alpha adds noise while modules are in training mode, which probes never are; leave it out."


def _objective(trainer: Any) -> Iterator[str]:
    if getattr(trainer.args, "loss_type", None) == "dft":
        yield (
            'loss_type="dft" is no objective: it weighs each token by its own probability as if that were constant, '
            'which only a gradient can do. Use loss_type="nll".'
        )
    half = sorted({str(p.dtype) for p in trainer.model.parameters() if p.dtype in HALF})
    if trainer.label_smoother is not None and half and trainer.accelerator.mixed_precision == "no":
        yield (
            f"label_smoothing_factor computes the loss in the precision of the weights, {half[0]}, too coarse for "
            "differences of losses. Set bf16=True, load the model in float32, or leave it out."
        )


def _steps(trainer: Any, mixin: type) -> Iterator[str]:
    bases = type(trainer).__mro__
    for base in bases[bases.index(mixin) + 1 :]:
        if base is Trainer:
            return
        is_known = base.__name__ in _SAME_STEP and base.__module__.startswith("trl.")
        if "training_step" in vars(base) and not is_known:
            yield (
                f"{base.__name__} has a training_step of its own, in whose place this one would run. If its loss is "
                "a function of the weights and the batch, derive it from ZOTrainer, and call super().training_step; "
                "trainers that generate (GRPO, RLOO) have a loss whose gradient alone means something: use zotune "
                "train with a reward."
            )
