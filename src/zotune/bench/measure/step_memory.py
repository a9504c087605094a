"""The memory of a training run's steps, apart from that of loading the model and of evaluations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from zotune.system.peak_memory import forget_peak, peak_memory, resident_memory


class StepMemory(TrainerCallback):  # type: ignore[misc]
    """A callback of `train` that reads the peak of each step.

    Loading includes the evaluation of the untuned model. Memory is that of the process (of torch on a GPU); what was
    there before the model is the baseline.

    Args:
        device: device of the run, as its option names it.
    """

    def __init__(self, device: str) -> None:
        is_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        self._device = torch.device(device if is_cuda and device != "auto" else "cuda" if is_cuda else "cpu")
        self._baseline = 0 if is_cuda else resident_memory()
        self._loading = self._step = 0
        self._forget()

    @property
    def peak(self) -> int:
        """The most bytes so far, in whichever part."""
        return max(self._loading, self._step, peak_memory(self._device))

    def numbers(self) -> dict[str, int]:
        """The bytes of a step and of loading above the baseline; empty if no step was taken."""
        if not self._step:
            return {}
        parts = {"step_bytes": self._step - self._baseline, "loading_bytes": self._loading - self._baseline}
        return {"baseline_bytes": self._baseline, **parts}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """End the loading."""
        self._loading = peak_memory(self._device)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin a step."""
        self._loading = max(self._loading, 0 if self._step else peak_memory(self._device))
        self._forget()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """End a step."""
        self._step = max(self._step, peak_memory(self._device))

    def _forget(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            forget_peak()
