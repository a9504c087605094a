"""How a model is read: as a causal language model, as a masked one, with a classification head, or by its text part.

The configuration alone decides, so that a dry run and the run decide alike. A family with a class for both kinds (BERT
has `BertForMaskedLM` and `BertLMHeadModel`) is read as what its attention is: without `is_decoder` each position sees
those after it, and a causal model would predict tokens that it has read. A model that also reads images or sound is
read on text alone, as its class of transformers does without them; it is saved whole, so that it still reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from zotune.errors import UsageError


@dataclass(frozen=True)
class ModelKind:
    """How a model is read.

    Attributes:
        words: the kind in words.
        auto_name: the class of transformers that makes such a model from its configuration.
        masked: whether the model fills in masks.
        classifies: whether it has a classification head.
        note: what to say of the model, after its name.
    """

    words: str
    auto_name: str
    masked: bool = False
    classifies: bool = False
    note: str = ""

    @property
    def auto_class(self) -> Any:
        """The class that `auto_name` names."""
        import transformers

        return getattr(transformers, self.auto_name)


_NOTE = "also reads images or sound: its text part is tuned, on text alone, and the whole model is saved"
CAUSAL = ModelKind("a causal language model", "AutoModelForCausalLM")
MASKED = ModelKind("a masked language model", "AutoModelForMaskedLM", masked=True)
CLASSIFIER = ModelKind("a sequence classifier", "AutoModelForSequenceClassification", classifies=True)
COMPOSITE = replace(CAUSAL, note=_NOTE)
IMAGE_TEXT = ModelKind("a model of images and text", "AutoModelForImageTextToText", note=_NOTE)
MULTIMODAL = ModelKind("a model of several kinds of input", "AutoModelForMultimodalLM", note=_NOTE)


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

    kind = config.model_type
    architectures = [architecture] if architecture is not None else config.architectures or []
    heads = {name.rpartition("For")[2] for name in architectures}
    if "SequenceClassification" in heads:
        return CLASSIFIER
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(_encoder_decoder_message(name, kind))
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if kind in MASKED_CLASSES and not is_decoder:
        return MASKED
    if "MaskedLM" in heads and kind not in CAUSAL_CLASSES:
        return MASKED
    if getattr(config.get_text_config(), "cross_attention_layers", None):
        raise UsageError(
            f"{name} ({kind}) has layers in its text part that read images alone (cross_attention_layers), so that "
            f"text without images does not go through all of it. zotune tunes on text alone. {_OWN_LOSS}"
        )
    if kind in CAUSAL_CLASSES:
        if why := _sees_later_tokens(config):
            raise UsageError(
                f"{name} cannot be read as a causal language model, because {why}: each position sees those after it."
            )
        return _causal_kind(config, heads, CAUSAL_CLASSES[kind])
    whole = _whole_kind(kind)
    return whole[0] if whole is not None else _other_kind(config, name, is_loaded=architecture is not None)


def _causal_kind(config: Any, heads: set[str], causal_class: Any) -> ModelKind:
    """Return how a model is read that has a causal class, which may be the class of its text part alone."""
    whole = None if config.get_text_config() is config or "CausalLM" in heads else _whole_kind(config.model_type)
    if whole is None:
        return CAUSAL
    kind, its_class = whole
    return COMPOSITE if its_class == causal_class else kind


def _whole_kind(model_type: str) -> tuple[ModelKind, str] | None:
    """Return the kind of a model of several kinds of input, and its class; None for any other type of model."""
    from transformers.models.auto import modeling_auto

    for kind, mapping in ((IMAGE_TEXT, "IMAGE_TEXT_TO_TEXT"), (MULTIMODAL, "MULTIMODAL_LM")):
        classes = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        if model_type in classes:
            return kind, classes[model_type]
    return None


def _other_kind(config: Any, name: str, *, is_loaded: bool) -> ModelKind:
    """Return how a model is read of which transformers has no language model of its own."""
    # A model with code of its own says which classes that has; without leave to run it, loading says so in words.
    own_classes = getattr(config, "auto_map", None) or {}
    for known in (CAUSAL, MASKED, CLASSIFIER):
        if known.auto_name in own_classes:
            return known
    if is_loaded or own_classes:
        return CAUSAL
    raise UsageError(
        f"{name} is a model of type {config.model_type}, of which transformers has no language model "
        "(AutoModelForCausalLM, AutoModelForMaskedLM) and no sequence classifier, so it has no loss on text that "
        f"zotune could read. {_OWN_LOSS}"
    )


_OWN_LOSS = (
    "With a loss of your own, zotune's optimizers tune any module of torch: opt = zotune.zo_sgd(model, lr=…), "
    "opt.step(lambda: loss)."
)


def _encoder_decoder_message(name: str, model_type: str) -> str:
    return (
        f"{name} is an encoder-decoder ({model_type}): one stack reads the input and another one writes the answer. "
        "zotune reads models of one stack, causal and masked language models and sequence classifiers; a pair of "
        "stacks would need rows split into two inputs, and a loss on the second one. Use a model of one stack. "
        f"{_OWN_LOSS}"
    )


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
