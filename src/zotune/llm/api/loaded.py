"""A model and a tokenizer that their owner has loaded, as zotune reads them, and the state in which they come back.

The model stays where its owner put it: on its device or devices, quantised, offloaded. While zotune uses it, its
modules are in eval mode. Afterwards modes, frozen parameters and modules are as before, whatever happened; what remains
is what was asked for: tuned values, or an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from zotune.errors import UsageError
from zotune.llm.api.plain_model import remember, without_earlier_adapter
from zotune.llm.checkpoints.causality import check_causal
from zotune.llm.checkpoints.model_kind import kind_of
from zotune.llm.distributed.mesh import mesh_of_shards
from zotune.llm.models.cache_argument import accept_old_name
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.quantized.backends import is_quantised
from zotune.model.shards import reshard
from zotune.model.wrappers import check_not_sharded
from zotune.system.processes import connected


@contextmanager
def borrowed(model: Any, tokenizer: Any) -> Iterator[LanguageModel]:
    """Yield a model and its tokenizer as a `LanguageModel` in eval mode, and restore the model's state afterwards.

    An adapter that was put around the model (`LanguageModel.module` is another one then) stays after success, with the
    model frozen inside it, as peft leaves it; after an exception, KeyboardInterrupt among them, it is taken away.

    Args:
        model: a causal or masked language model or a sequence classifier of transformers, or one with an adapter of
            peft.
        tokenizer: its tokenizer, or a processor that has one.

    Raises:
        UsageError: zotune cannot read a model of this kind, or the tokenizer is none.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile; probes run the uncompiled code
    model = without_earlier_adapter(model)
    lm = _language_model(model, tokenizer)
    lm.mesh = mesh_of_shards(lm.base, connected(), lm) or lm.mesh
    # What FSDP2 has gathered takes the place of the slices, which are the model's own parameters.
    reshard(model)
    state = _State(model)
    model.eval()
    try:
        if lm.num_virtual_tokens:
            accept_old_name(lm.base)
        if not (lm.masked or is_quantised(lm.base)):
            check_causal(lambda ids: lm.read_with(lm.module, ids), lm.vocabulary, lm.name)
        reshard(model)
        yield lm
    except BaseException:
        reshard(model)
        state.restore()
        raise
    state.settle(lm.module)
    if lm.module is not model:
        remember(model)


# What peft and `accept_old_name` set on modules of the model itself.
_SET = ("forward", "peft_config")


class _State:
    """The state of a model's modules: children, parameters, mode, what `_SET` names, and what requires a gradient."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [
            (m, m.training, dict(m._modules), dict(m._parameters), {k: vars(m)[k] for k in _SET if k in vars(m)})
            for m in model.modules()
        ]
        self._parameters = [(p, p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        """Restore everything."""
        for module, training, children, parameters, _ in self._modules:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
            module.training = training
        self._restore_attributes()

    def settle(self, module: nn.Module) -> None:
        """Restore everything but an adapter around the model, whose new modules get the mode of the model."""
        known = {id(m) for m, *_ in self._modules}
        for m, training, *_ in self._modules:
            m.training = training
        for new in module.modules():
            new.training = new.training if id(new) in known else self._model.training
        if module is self._model:
            self._restore_attributes()

    def _restore_attributes(self) -> None:
        for parameter, requires_grad in self._parameters:
            parameter.requires_grad_(requires_grad)
        for module, *_, attributes in self._modules:
            for name in _SET:
                vars(module).pop(name, None)
            vars(module).update(attributes)


def _language_model(model: Any, tokenizer: Any) -> LanguageModel:
    from transformers import PreTrainedModel

    _check_adapter(model)
    is_peft = hasattr(model, "get_base_model")
    base = model.get_base_model() if is_peft else model
    if not isinstance(base, PreTrainedModel):
        if isinstance(model, nn.Module) and not isinstance(model, nn.parallel.DistributedDataParallel):
            check_not_sharded(model)
        raise UsageError(_no_model_message(model))
    name = base.name_or_path or type(base).__name__
    kind = kind_of(base.config, name, type(base).__name__)
    if kind.classifies:
        return LanguageModel(model, _tokenizer(tokenizer), name, masked=True, classifies=True)
    if base.get_output_embeddings() is None:
        raise UsageError(
            f"{type(base).__name__} has no language-modelling head, so it has no loss on text. Load it with "
            f"transformers.{kind.auto_class.__name__}.from_pretrained."
        )
    return LanguageModel(model, _tokenizer(tokenizer), name, kind.masked)


def _check_adapter(model: Any) -> None:
    """Refuse adapters that no `PeftModel` is around: nothing would say which of them is tuned, or save them."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel) or not isinstance(model, nn.Module):
        return
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise UsageError(
            f"{type(model).__name__} has layers of an adapter in it, but is no peft.PeftModel itself. If an earlier "
            "train() added them, pass its result.model, or result.model.unload() for the plain model. In place of "
            "model.add_adapter, use peft.get_peft_model, and pass what it returns."
        )


def _no_model_message(model: Any) -> str:
    from transformers import PreTrainedTokenizerBase

    if isinstance(model, str):
        return (
            f"the model is the text {model!r}, not a loaded model: pass `model, tokenizer = zotune.llm.load({model!r})`"
            ", or what from_pretrained of transformers returns."
        )
    if isinstance(model, PreTrainedTokenizerBase):
        return "the first argument is a tokenizer: the model comes first, train(model, tokenizer, rows)."
    inner = getattr(model, "module", None)
    if isinstance(inner, nn.Module):
        return f"{type(model).__name__} wraps the model: pass the model itself, model.module."
    remedy = " For any other torch module use an optimizer, zotune.zo_sgd(model, lr=…)."
    return (
        f"the model is a {type(model).__name__}; it must be a transformers.PreTrainedModel or a peft.PeftModel."
        f"{remedy if isinstance(model, nn.Module) else ''}"
    )


def _tokenizer(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerBase

    for found in (tokenizer, getattr(tokenizer, "tokenizer", None)):  # a processor has a tokenizer
        if isinstance(found, PreTrainedTokenizerBase):
            return found
    what = "missing" if tokenizer is None else f"a {type(tokenizer).__name__}"
    raise UsageError(
        f"the tokenizer is {what}; pass the model's own, transformers.AutoTokenizer.from_pretrained(…), as the second "
        "argument."
    )
