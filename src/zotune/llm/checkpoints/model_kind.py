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
    if kind in CAUSAL_CLASSES:
        if why := _sees_later_tokens(config):
            raise UsageError(
                f"{name} cannot be read as a causal language model, because {why}: each position sees those after it."
            )
        return CAUSAL if config.get_text_config() is config else COMPOSITE
    return _other_kind(config, name, is_loaded=architecture is not None)


def _other_kind(config: Any, name: str, *, is_loaded: bool) -> ModelKind:
    """Return how a model is read of which transformers has neither a causal nor a masked language model."""
    from transformers.models.auto import modeling_auto

    for auto, mapping in ((IMAGE_TEXT, "IMAGE_TEXT_TO_TEXT"), (MULTIMODAL, "MULTIMODAL_LM")):
        if config.model_type in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", ()):
            return auto
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
