"""Loading a model by a device map, and streaming its layers that lie on the disk or in the memory beside a GPU.

transformers reads the checkpoint; of a layer on the disk it notes in which safetensors file each tensor is. Here that
file is mapped, so that a frozen matrix is read from where it is; one that is tuned is copied before it is written
(`zotune.model.streaming`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import NotWrittenError, UsageError
from zotune.llm.checkpoints.model_kind import ModelKind
from zotune.llm.checkpoints.no_code import NO_CODE
from zotune.llm.checkpoints.pretrained import read_pretrained
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.placement.device_map import DISK, Placement, check_here, is_placed, placement_of
from zotune.model.layers import ReadTracer, stack_of
from zotune.model.mapped_memory import ScratchFile, is_mapped, mapped_safetensors, release
from zotune.model.parameters import ParameterSet
from zotune.model.streaming import LayerStream, stream_of
from zotune.system.scratch_folder import scratch_folder


def open_scratch(options: ModelOptions) -> ScratchFile | None:
    """Make the offload folder if need be, and open the file in it.

    Raises:
        UsageError: the folder cannot be written.
    """
    if options.offload_folder is None:
        return None
    try:
        options.offload_folder.mkdir(parents=True, exist_ok=True)
        return ScratchFile(options.offload_folder)
    except (OSError, NotWrittenError) as error:
        raise UsageError(
            f"the offload folder {str(options.offload_folder)!r} cannot be written: "
            f"{getattr(error, 'strerror', None) or error} Choose another --offload-folder."
        ) from None


def read_by_map(
    source: str, kind: ModelKind, options: ModelOptions, config: Any, device: torch.device, arguments: dict[str, Any]
) -> Any:
    """Load a checkpoint by a device map; layers that lie elsewhere than where they run are streamed.

    Args:
        source: the model's folder, or its name on the Hub.
        kind: how the model is read.
        options: with a device map or an offload folder.
        config: the model's configuration.
        device: the device of the options.
        arguments: further arguments of `read_pretrained`.

    Raises:
        UsageError: it cannot be loaded that way; the message says why.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"{options.model} is quantised in its checkpoint, by a library that keeps its weights on one device. "
            "Leave out --device-map and --offload-folder, or use a GGUF file, whose layers can be streamed."
        )
    dtype = config.dtype if arguments["dtype"] == "auto" else arguments["dtype"]
    with torch.device("meta"):
        shapes = kind.auto_class.from_config(
            config, dtype=dtype or torch.float32, **{**NO_CODE, "trust_remote_code": options.trust_remote_code}
        )
    with _loading_by_map(options, source, shapes, device) as loading:
        module = read_pretrained(source, kind, options.model, **arguments, **loading.arguments)
        loading.finish(module)
    return module


@contextmanager
def _loading_by_map(options: ModelOptions, source: str, module: nn.Module, device: torch.device) -> Iterator[_Loading]:
    """Yield the arguments with which transformers loads a model by the options' device map; the rest is up to `finish`.

    Args:
        options: with a device map or an offload folder.
        source: the model's folder, or its name on the Hub.
        module: the model on `meta`.
        device: the device of the options.

    Raises:
        UsageError: the model cannot be loaded that way; nothing has been read.
    """
    placement = placement_of(options, module, device)
    check_here(placement, options)
    uses_disk = DISK in placement.map.values()
    if uses_disk:
        check_safetensors(source)
    scratch = open_scratch(options) if uses_disk else None
    arguments: dict[str, Any] = {"device_map": placement.explicit}
    if scratch is None:
        yield _Loading(arguments, placement, None)
        return
    # Tensors that transformers converts are written anew; they stay mapped when the folder goes.
    with scratch_folder(scratch.folder) as converted:
        arguments |= {"offload_folder": str(converted), "use_safetensors": True}
        yield _Loading(arguments, placement, scratch)


class _Loading:
    """What `loading_by_map` yields.

    Attributes:
        arguments: of `from_pretrained`.
    """

    def __init__(self, arguments: dict[str, Any], placement: Placement, scratch: ScratchFile | None) -> None:
        self.arguments, self._placement, self._scratch = arguments, placement, scratch

    def finish(self, model: Any) -> None:
        """Stream the layers of the loaded model that accelerate would bring in one tensor at a time."""
        if self._placement.streamed_layers:
            _take_over(model, self._placement, self._scratch)
        kept = {k: v for k, v in self._placement.map.items() if not self._placement.is_offloaded(v)}
        if any(p.is_meta for p in model.parameters()):
            return
        # Else peft would place the modules of an adapter, and its caches, by the map of what has other places now.
        model.hf_device_map = kept
        if len(set(kept.values())) == 1:
            from accelerate.hooks import remove_hook_from_submodules

            remove_hook_from_submodules(model)
            del model.hf_device_map


def check_safetensors(source: str) -> None:
    """Check that a folder holds its weights in safetensors files, which can be read a tensor at a time.

    Raises:
        UsageError: it does not.
    """
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found = [
            path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack") for path in folder.glob(pattern)
        ]
        other = f" (it holds {found[0]})" if found else ""
        raise UsageError(
            f"{source} has no safetensors file{other}, and no other format can be read a part at a time. Load the "
            "model with transformers on a machine that holds it, and save it with save_pretrained."
        )


def _take_over(model: Any, placement: Placement, scratch: ScratchFile | None) -> None:
    """Give the layers that accelerate offloads their weights from the file or the memory, and stream them."""
    from accelerate.hooks import remove_hook_from_module

    path, layers = stack_of(model)
    files: dict[str, dict[str, Tensor]] = {}
    replaced: dict[int, nn.Parameter] = {}
    for index in placement.streamed_layers:
        layer, prefix = layers[index], f"{path}.{index}" if path else str(index)
        weights = _weights_of(layer)
        remove_hook_from_module(layer, recurse=True)
        for name, module in layer.named_modules(prefix=prefix):
            for attribute, p in module._parameters.items():
                if p is None or not p.is_meta:
                    continue
                if id(p) not in replaced:
                    home = _home(weights, f"{name}.{attribute}", p, files, scratch)
                    replaced[id(p)] = nn.Parameter(home, requires_grad=p.requires_grad)
                module._parameters[attribute] = replaced[id(p)]
    LayerStream(model, scratch, placement.device, placement.streamed_layers)


def _weights_of(layer: nn.Module) -> Any:
    """The weights that accelerate loads a layer from: in memory (`state_dict`), or in files (`index`)."""
    for module in layer.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "weights_map", None) is not None:
                return one.weights_map.dataset
    raise UsageError(f"accelerate does not offload the layer {type(layer).__name__}, so it cannot be streamed.")


def _home(
    weights: Any, name: str, p: Tensor, files: dict[str, dict[str, Tensor]], scratch: ScratchFile | None
) -> Tensor:
    """Return the tensor that a parameter lies in between two uses of its layer."""
    if name in weights.state_dict:
        value: Tensor = weights.state_dict[name].detach()
        return value
    entry = weights.index[name]
    file = entry["safetensors_file"]
    if file not in files:
        files[file] = mapped_safetensors(Path(file))
    found = files[file].get(entry["weight_name"])
    found = weights[name].cpu() if found is None else found
    if p.dim() <= 1:
        return found.to(p.dtype, copy=True)
    if found.dtype == p.dtype and is_mapped(found):
        return found
    assert scratch is not None
    kept = scratch.copy(found.to(p.dtype))
    release(found)
    return kept


def stream_in_memory(
    model: nn.Module, options: ModelOptions, device: torch.device, scratch: ScratchFile | None = None
) -> None:
    """Stream the layers of a model that is in memory, or mapped, if the options name an offload folder.

    Raises:
        UsageError: the model does not fit.
        NotWrittenError: the disk is full.
    """
    if (scratch := scratch or open_scratch(options)) is None:
        return
    placement = placement_of(options, model, device)
    check_here(placement, options)
    for p in (p for of_layer in placement.streamed_matrices for p in of_layer):
        p.data = scratch.kept(p.data)
    LayerStream(model, scratch, device, placement.streamed_layers)


@contextmanager
def reads_within_layers(model: nn.Module, name: str) -> Iterator[None]:
    """Within this context a model runs; afterwards it is known that only a layer itself reads its streamed matrices.

    Raises:
        UsageError: one is read elsewhere, where it might not be there, or be behind the steps taken.
    """
    stream = stream_of(model)
    matrices = [] if stream is None else [p for of_layer in stream.matrices for p in of_layer if p.is_floating_point()]
    if stream is None or not matrices:
        yield
        return
    read = ParameterSet(model, matrices)
    with ReadTracer(read) as seen:
        yield
    depths = {id(layer): depth for depth, layer in enumerate(stack_of(model)[1])}
    for layer, of_layer in zip(stream.layers, stream.matrices, strict=True):
        for tensor in filter(None, map(read.find, of_layer)):
            if {seen.first.get(tensor.id), seen.last.get(tensor.id)} - {None, depths[id(layer)]}:
                raise UsageError(
                    f"{name} reads {tensor.name} outside its layer, so its layers cannot be streamed. Leave out "
                    "--offload-folder and --device-map."
                )


def check_no_new_head(model: nn.Module, name: str) -> None:
    """Check that a model can get a new head, which is made with all weights in memory.

    Raises:
        UsageError: its layers are streamed.
    """
    if stream_of(model) is not None:
        raise UsageError(
            f"{name} would get a new classification head, which cannot be put on layers that are streamed from an "
            "offload folder. Use --prompt aligned, which keeps the model's own head, or load it into memory."
        )


def place_rest(model: nn.Module, options: ModelOptions, device: torch.device) -> None:
    """Move what is not placed yet, such as an adapter or a new head, to the device that computes."""
    stream = stream_of(model)
    if stream is not None:
        stream.place_others()
    if options.device_map is not None or not is_placed(options):
        return
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and (stream is None or stream.layer_of(p) is None) and p.device != device:
                p.data = p.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
