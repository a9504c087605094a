"""The user's own rows for a sequence classifier: its head scores the classes that its configuration names.

A label is the name of a class in any case, or the number of one; where it may be either, the verbalizer tells. The
model reads the text alone, as the head was trained to; a template may join several columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from zotune.errors import UsageError, did_you_mean, listed
from zotune.llm.config.data import DataOptions
from zotune.llm.data.examples import Example
from zotune.llm.models.language_model import LanguageModel

Chosen = TypeVar("Chosen", bound=DataOptions)
TEMPLATE = "{text}"


def for_classes(lm: LanguageModel, options: Chosen) -> Chosen:
    """Return the options with which rows with labels become examples of a classifier's classes.

    Args:
        lm: a sequence classifier.
        options: the options of the user's own rows; their verbalizer names a class for each label.

    Raises:
        UsageError: the rows are of another format, the head has no classes, the verbalizer names none of them, or a
            label may mean two of them.
    """
    if options.data_format not in (None, "classification"):
        raise UsageError(
            f"{lm.name} is a sequence classifier, which gives each text a class, so it cannot learn from rows of "
            f"data_format: {options.data_format}. Use rows with a text and a label, or a causal language model."
        )
    names = class_names(lm.config, lm.name)
    known = _spellings(names)
    chosen = {}
    for label, word in options.verbalizer.items():
        if word.strip() not in known:
            raise UsageError(
                f"verbalizer: {lm.name} has no class {word.strip()!r} for the label {label!r}."
                f"{did_you_mean(word.strip(), names)}"
            )
        chosen[label] = known[word.strip()]
    _check_unambiguous(names, options.verbalizer, lm.name)
    words = {**known, **chosen}
    update = {"data_format": "classification", "verbalizer": words, "template": options.template or TEMPLATE}
    return options.model_copy(update=update)


def in_order_of_outputs(lm: LanguageModel) -> Callable[[Example], Example]:
    """Return a function from an example to the same with all classes as candidates, in the order of the head's outputs.

    The rows' verbalizer tells nothing of that order, and may leave classes out.
    """
    names = class_names(lm.config, lm.name)
    return lambda e: replace(e, candidates=names, label=names.index(e.candidates[e.label].strip()))


def _check_unambiguous(names: tuple[str, ...], given: Mapping[str, str], model: str) -> None:
    """Refuse labels that are the name of one class and the number of another, unless the verbalizer tells which."""
    found = [str(i) for i, name in enumerate(names) if str(i) in names and str(i) != name and str(i) not in given]
    if found:
        label, of_number = found[0], names[int(found[0])]
        raise UsageError(
            f"the label {label!r} may mean two classes of {model}: that of the name {label!r}, or that of the number "
            f"{label}, whose name is {of_number!r}. Name the class of each such label ({listed(found)}): --verbalizer "
            f"{' '.join(f'{one} {one}' for one in found[:3])} if labels are names, --verbalizer "
            f"{' '.join(f'{one} {names[int(one)]}' for one in found[:3])} if they are numbers."
        )


def class_names(config: Any, name: str) -> tuple[str, ...]:
    """Return the names of a classifier's classes, in the order of the head's outputs.

    Args:
        config: its configuration of transformers.
        name: its name, for errors.

    Raises:
        UsageError: its head predicts a number or several classes at once, or two classes have one name.
    """
    if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        kind = config.problem_type or "regression"
        raise UsageError(
            f"the head of {name} has {config.num_labels} output(s) for {kind}; zotune tunes heads that choose one of "
            "several classes. With a loss of your own, zotune's optimizers tune it: zotune.zo_sgd(model, lr=…)."
        )
    names = tuple(str(config.id2label[i]).strip() for i in range(config.num_labels))
    if len(set(names)) < len(names) or not all(names):
        raise UsageError(f"the classes of {name} have no names of their own: {', '.join(names)}. Correct its id2label.")
    return names


def _spellings(names: tuple[str, ...]) -> dict[str, str]:
    """Return the names of classes by the labels that mean them: a name, its number, or its lower case.

    >>> _spellings(("No", "Yes"))
    {'0': 'No', '1': 'Yes', 'no': 'No', 'yes': 'Yes', 'No': 'No', 'Yes': 'Yes'}
    """
    lower = [name.lower() for name in names]
    cases = {small: name for small, name in zip(lower, names, strict=True) if lower.count(small) == 1}
    return {**{str(i): name for i, name in enumerate(names)}, **cases, **{name: name for name in names}}
