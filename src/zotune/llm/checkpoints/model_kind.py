"""How a model is read: as a causal language model, as a masked one, or with a classification head.

The configuration alone decides, so that a dry run and the run decide alike. A family with a class for both kinds (BERT
has `BertForMaskedLM` and `BertLMHeadModel`) is read as what its attention is: without `is_decoder` each position sees
those after it, and a causal model would predict tokens that it has read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zotune.errors import UsageError


@dataclass(frozen=True)
class ModelKind:
    """How a model is read.

    Attributes:
        words: the kind in words.
        masked: whether the model fills in masks.
        classifies: whether it has a classification head.
    """

    words: str
    masked: bool = False
    classifies: bool = False

    @property
    def auto_class(self) -> Any:
        """The class of transformers that makes such a model from its configuration."""
        import transformers

        if self.classifies:
            return transformers.AutoModelForSequenceClassification
        return transformers.AutoModelForMaskedLM if self.masked else transformers.AutoModelForCausalLM


CAUSAL = ModelKind("a causal language model")
MASKED = ModelKind("a masked language model", masked=True)
CLASSIFIER = ModelKind("a sequence classifier", classifies=True)


def kind_of(config: Any, name: str, architecture: str | None = None) -> ModelKind:
    """Return how a model is read.

    Args:
        config: its configuration of transformers.
        name: its name, for errors.
        architecture: the class of a model that is loaded; default: the classes that the configuration names.

    Raises:
        UsageError: zotune cannot read a model of this kind.

    >>> from transformers import BertConfig
    >>> kind_of(BertConfig(), "bert").words, kind_of(BertConfig(is_decoder=True), "bert").words
    ('a masked language model', 'a causal language model')
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_CLASSES
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_CLASSES

    architectures = [architecture] if architecture is not None else config.architectures or []
    heads = {name.rpartition("For")[2] for name in architectures}
    if "SequenceClassification" in heads:
        return CLASSIFIER
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{name} is an encoder-decoder ({config.model_type}); zotune reads causal and masked language models and "
            "sequence classifiers."
        )
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if config.model_type in MASKED_CLASSES and not is_decoder:
        return MASKED
    if "MaskedLM" in heads and config.model_type not in CAUSAL_CLASSES:
        return MASKED
    if config.model_type in CAUSAL_CLASSES and (why := _sees_later_tokens(config)):
        raise UsageError(
            f"{name} cannot be read as a causal language model, because {why}: each position sees those after it."
        )
    return CAUSAL


def _sees_later_tokens(config: Any) -> str | None:
    """Return what in a configuration makes attention two-sided, or None."""
    text = config.get_text_config()
    if getattr(text, "is_causal", True) is False:
        return "its configuration sets is_causal: false"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "its configuration sets use_bidirectional_attention"
    if getattr(text, "attn_type", None) == "bi":
        return 'its configuration sets attn_type: "bi"'
    return None
