"""Wrappers around a model that are no part of it: its tensors keep the names that they have without them.

Compilers and sharding put an attribute of their own into the names (`_orig_mod`), which no model has; data parallelism
uses the plain word `module`, so that only the wrapper's class tells it from a model's own part of that name.
"""

from __future__ import annotations

import re

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from zotune.errors import UsageError

# Names that compilers, sharding and checkpointing wrappers put in front of or between a model's own.
_ATTRIBUTES = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")
_ADAPTER_PREFIX = "base_model.model."
_HOLDS_MODULE = (DataParallel, DistributedDataParallel, AveragedModel)


def without_wrappers(name: str) -> str:
    """A name of a module or tensor without the attributes of compilers, sharding and adapters.

    >>> without_wrappers("base_model.model._orig_mod.fc.weight"), without_wrappers("_orig_mod")
    ('fc.weight', '')
    """
    return _ATTRIBUTES.sub("", name).removesuffix(".").removeprefix(_ADAPTER_PREFIX)


def own_paths(model: nn.Module) -> dict[str, str]:
    """Each module's path in `model`, with its path in the model that data-parallel wrappers wrap.

    >>> own_paths(nn.DataParallel(nn.Sequential(nn.ReLU())))
    {'': '', 'module': '', 'module.0': '0'}
    """
    paths: dict[str, str] = {"": ""}
    found = dict(model.named_modules(remove_duplicate=False))
    for path in found:
        if path:
            parent, _, attribute = path.rpartition(".")
            is_wrapped = attribute == "module" and isinstance(found[parent], _HOLDS_MODULE)
            paths[path] = paths[parent] if is_wrapped else joined(paths[parent], attribute)
    return paths


def joined(path: str, attribute: str) -> str:
    """The path of a module's attribute."""
    return f"{path}.{attribute}" if path else attribute


def check_not_sharded(model: nn.Module) -> None:
    """Refuse a model that a wrapper of training by gradients holds: its processes would drift apart, or its tensors are
    no longer those whose element numbers the noise follows.

    Raises:
        UsageError: FSDP1 or DeepSpeed has joined its tensors into flat ones, or DistributedDataParallel wraps it in
            several processes.
    """
    for module in model.modules():
        handle = getattr(module, "_handle", None)
        is_cut = getattr(handle, "uses_sharded_strategy", False)
        own = list(module.parameters(recurse=False))
        if is_cut or any(getattr(p, "_is_flat_param", False) for p in own):
            raise UsageError(
                "FSDP holds the model's tensors in flat ones, in which a number's place is not its place in its own "
                "tensor, so its noise would be another. Shard the model by FSDP2 instead: "
                "torch.distributed.fsdp.fully_shard of each layer and of the model. (Or wrap it with "
                "sharding_strategy=NO_SHARD and use_orig_params=True.)"
            )
        if type(module).__name__ == "DeepSpeedEngine" or any(hasattr(p, "ds_id") for p in own):
            raise UsageError(
                "DeepSpeed holds the model, whose tensors it joins and cuts for gradients that forward passes do not "
                "have. Make the optimizer of the model without DeepSpeed; where one device does not hold it, shard it "
                "by FSDP2 (torch.distributed.fsdp.fully_shard)."
            )
        if isinstance(module, DistributedDataParallel) and dist.get_world_size(module.process_group) > 1:
            raise UsageError(
                "DistributedDataParallel averages gradients, which forward passes do not have: each process would take "
                "a step of its own. Give the model as it is (its .module), and let the processes share a step with "
                "zotune.accumulate(…, mesh=zotune.mesh())."
            )
