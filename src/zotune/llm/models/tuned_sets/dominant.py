"""The one decoder layer at which outliers of activations first appear (arXiv 2606.05516), found in a forward pass.

Outliers are the model's own and not those of a text, so a fixed text finds the layer before any row is read.
"""

from __future__ import annotations

from zotune.errors import UsageError
from zotune.llm.config.step import StepOptions
from zotune.llm.models.language_model import LanguageModel
from zotune.messages import say
from zotune.methods.block_coordinate import dominant_index, magnitudes
from zotune.model.layers import stack_of

_TEXT = (
    "The weather was fine, and the people of the town had come to the market early. They bought bread, apples and "
    "fish, and those who had time sat down in the sun."
)


def with_dominant_layer(lm: LanguageModel, config: StepOptions) -> StepOptions:
    """The options with the number of the dominant layer in place of `only_layer: dominant`; the model keeps the number.

    A plan has no weights to find it with, and shows the first layer: the others take no more memory.

    Raises:
        UsageError: the model has no stack of layers, or none of them has outliers; the message names the numbers.
    """
    if config.only_layer != "dominant":
        return config
    path, layers = stack_of(lm.text_model)
    if any(p.is_meta for layer in layers for p in layer.parameters()):
        say(
            "only_layer: dominant: the run finds its layer by a forward pass before the first step; these figures are "
            f"those of {path}.0, below which nothing is reused"
        )
        return config.model_copy(update={"only_layer": 0})
    passes = lm.num_forwards
    batch = lm.tokenizer(_TEXT, return_tensors="pt").to(lm.device)
    ids, mask = (batch[name][:, : lm.context] for name in ("input_ids", "attention_mask"))

    def run() -> None:
        lm.read(ids, mask)

    try:
        lm.only_layer = dominant_index(lm.text_model, run)
    except UsageError as error:
        raise UsageError(f"only_layer: dominant: {error}") from None
    top, middle = magnitudes(lm.text_model, run)[lm.only_layer]
    lm.num_forwards = passes
    say(
        f"the dominant layer is {path}.{lm.only_layer}, where outliers first appear (largest |h| {top:.4g}, median "
        f"{middle:.3g}); it alone is tuned"
    )
    return config.model_copy(update={"only_layer": lm.only_layer})
