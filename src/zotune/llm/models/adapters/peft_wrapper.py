"""peft's model around a language model, with an adapter whose initial weights depend on the seed alone."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from zotune.llm.checkpoints.adapter_folder import NORM_OF_A_MODEL
from zotune.llm.checkpoints.hub_names import name_base_for_all
from zotune.llm.checkpoints.stand_ins import stand_ins
from zotune.llm.config.step import StepOptions
from zotune.llm.models.cache_argument import accept_old_name
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.placement.sharded import cut_adapter


def wrap_with_peft(lm: LanguageModel, adapter: Any, config: StepOptions) -> None:
    """Let `lm.module` be peft's model with an adapter, drawn with `config.seed`, in eval mode."""
    from peft import get_peft_model

    if adapter.is_prompt_learning:
        accept_old_name(lm.base)
    # peft draws initial weights from torch's global generators, whose states are restored afterwards.
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        stand_ins(lm.module, lm.device),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage")
        warnings.filterwarnings("ignore", message=NORM_OF_A_MODEL)
        torch.manual_seed(config.seed)
        lm.module = get_peft_model(lm.module, adapter, revision=config.model_revision)
    cut_adapter(lm.base)
    name_base_for_all(lm.module)
    lm.module.eval()


def task_type(lm: LanguageModel) -> str:
    """Return what peft calls the kind of a model."""
    if lm.classifies:
        return "SEQ_CLS"
    # peft has no class for masked language models; its class for feature extraction passes all outputs through.
    return "FEATURE_EXTRACTION" if lm.masked else "CAUSAL_LM"


@torch.no_grad()
def read_a_token(lm: LanguageModel) -> None:
    """Run a forward pass on one token, in which an adapter that does not fit the model fails."""
    token = torch.ones(1, 1, dtype=torch.long, device=lm.device)
    lm.read(token, token)
