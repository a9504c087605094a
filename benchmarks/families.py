"""The table of model families: is each one tuned by each scheme, and is what was saved what was measured?

For every family of causal and masked language models, and of models of text and images or sound, that
`tests/model_families.py` and `tests/more_families.py` build in tiny with random weights: tune it for one step with each
scheme, save it, load the folder with plain transformers and peft, and compare the loss on the same rows, computed here
one sequence at a time, with the one that the run reports. What zotune refuses is in the table with its reason.

    python benchmarks/families.py                       # all of them, and the table in docs/reference/families.md
    python benchmarks/families.py --only llama bert     # some, printed and not written
    python benchmarks/families.py --missing             # those that the results do not have yet
    python benchmarks/families.py --page                # the table again, from the results

No GPU, no network; some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "reference" / "families.md"
BEGIN, END = "<!-- table: benchmarks/families.py -->", "<!-- end of the table -->"
SCHEMES = ("full", "head", "lora", "prefix", "prompt")
TEXTS = ("a gorgeous film", "dull", "it never quite comes alive , and then it ends", "fine acting", "warm", "bad")
ROWS = [{"text": text, "label": ("no", "yes")[i % 2]} for i, text in enumerate(TEXTS)]
# Words of one token for models that fill in a mask, of several for those that go on.
WORDS = {True: {"yes": "great", "no": "terrible"}, False: {"yes": "yes", "no": "no way"}}
# Two ways to add up numbers in float32.
TOLERANCE = 2e-4

sys.path.insert(0, str(ROOT / "tests"))


@dataclass(frozen=True)
class Cell:
    """What came of one family and one scheme.

    Attributes:
        outcome: "same" if plain transformers and peft compute the loss of the run, "refused", or "different".
        reason: of a refusal or a failure.
        num_tuned: tuned parameters.
        loss, plain_loss: the loss that the run reports for the saved model, and that of the loaded one.
    """

    family: str
    kind: str
    scheme: str
    outcome: str
    reason: str = ""
    num_tuned: int = 0
    loss: float | None = None
    plain_loss: float | None = None


def families() -> dict[str, dict[str, Any]]:
    """Return the families by kind: their names, and the class and the values of their tiny configurations."""
    import model_families
    import more_families

    further = more_families.further
    return {
        "causal": {**model_families.CAUSAL, **further(more_families.CAUSAL_TYPES, is_decoder=True)},
        "masked": {**model_families.MASKED, **further(more_families.MASKED_TYPES, is_decoder=False)},
        "text and images or sound": model_families.COMPOSITE,
    }


def auto_class(kind: str) -> Any:
    """Return the class of transformers that makes a model of a kind."""
    import transformers

    names = {"causal": "CausalLM", "masked": "MaskedLM"}
    return getattr(transformers, f"AutoModelFor{names.get(kind, 'MultimodalLM')}")


def write_base(folder: Path, kind: str, family: str) -> Any:
    """Write the tiny model of a family with its tokenizer, and return its configuration."""
    import transformers

    import model_families
    from zotune.llm.models.random_models import byte_tokenizer

    name, options = families()[kind][family]
    shape = {} if kind.startswith("text") else model_families.SHAPE
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**shape, **options})
    model = auto_class(kind).from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # initial values of some layers are zero, and would hide what is lost
            p += 0.02 * torch.randn(p.shape)
    model.save_pretrained(folder)
    byte_tokenizer(config.get_text_config()).save_pretrained(folder)
    return config


def tune(base: Path, out: Path, rows: Path, scheme: str, *, masked: bool) -> Any:
    """Tune the model in a folder for one step, and return the result of the run."""
    from zotune.llm.config.run import TrainConfig
    from zotune.llm.training.train import train

    given = {"train_file": rows, "eval_file": rows, "num_dev": 0, "verbalizer": WORDS[masked], "template": "{text} so"}
    run = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "mu": 1e-2, "device": "cpu"}
    return train(TrainConfig(model=str(base), output_dir=out, tuning=scheme, **given, **run))


@torch.no_grad()
def plain_loss(base: Path, out: Path, kind: str) -> float:
    """Return the mean loss on the rows of what a folder holds, loaded and read as without zotune."""
    model, tokenizer = plain_model(base, out, kind)
    losses, masked = [], kind == "masked"
    for row in ROWS:
        words = dict.fromkeys(WORDS[masked][label] for label in sorted(WORDS[masked]))
        scores = torch.stack([score(model, tokenizer, f"{row['text']} so", word, masked=masked) for word in words])
        losses.append(-scores.log_softmax(0)[list(words).index(WORDS[masked][row["label"]])])
    return float(torch.stack(losses).mean())


def plain_model(base: Path, out: Path, kind: str) -> tuple[Any, Any]:
    """Return the model and the tokenizer in a folder, by plain transformers and peft."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    is_adapter = (out / "adapter_config.json").is_file()
    model = auto_class(kind).from_pretrained(base if is_adapter else out)
    model = PeftModel.from_pretrained(model, out) if is_adapter else model
    return model.eval(), AutoTokenizer.from_pretrained(out)


def score(model: Any, tokenizer: Any, prompt: str, word: str, *, masked: bool) -> torch.Tensor:
    """Return the score of a word after a prompt: the mean log-probability of its tokens, or its logit at a mask."""
    if masked:
        ids = tokenizer(f"{prompt}{tokenizer.mask_token}")["input_ids"]
        logits = read(model, ids)[ids.index(tokenizer.mask_token_id)]
        return logits[tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0]]
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {word}")["input_ids"]
    logits = read(model, ids[:-1]).log_softmax(-1)
    return torch.stack([logits[i - 1, ids[i]] for i in range(start, len(ids))]).mean()


def read(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits of one sequence in float64, without those of virtual tokens before it."""
    tokens = torch.tensor([ids])
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -len(ids) :].double()


def try_cell(folder: Path, kind: str, family: str, scheme: str) -> Cell:
    """Return what comes of one family, whose model is in `folder / "base"`, and one scheme."""
    from zotune.errors import ZotuneError

    masked, out, rows = kind == "masked", folder / scheme, folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    try:
        with redirect_stderr(StringIO()):
            result = tune(folder / "base", out, rows, scheme, masked=masked)
    except ZotuneError as error:
        reason = str(error).replace(str(folder / "base"), family)
        return Cell(family, kind, scheme, "refused", reason)
    except Exception as error:
        return Cell(family, kind, scheme, "different", f"{type(error).__name__}: {error}"[:300])
    loss = result.test.loss
    try:
        found = plain_loss(folder / "base", out, kind)
    except Exception as error:
        return Cell(family, kind, scheme, "different", f"loading: {type(error).__name__}: {error}"[:300], loss=loss)
    same = abs(found - loss) <= TOLERANCE * max(1.0, abs(loss))
    return Cell(family, kind, scheme, "same" if same else "different", "", result.num_tuned, loss, found)


def cells(kind: str, family: str, schemes: tuple[str, ...] = SCHEMES) -> Iterator[Cell]:
    """Yield the cells of one family."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(action="ignore"):
        write_base(Path(name) / "base", kind, family)
        yield from (try_cell(Path(name), kind, family, scheme) for scheme in schemes)


def general(cell: Cell) -> str:
    """Return the reason of a refusal without the name of the family and of its tensors."""
    reason = re.sub(rf"{re.escape(cell.family)}( \([\w-]+\))?", "NAME", cell.reason)
    reason = re.sub(r" \(0\.\d+\)", "", reason)
    remedy = r"some \1: tune others (--tuned-parameters, --lora-target-modules)."
    return re.sub(r"\d+ of \d+ (tuned tensors were not read by the forward pass):.*", remedy, reason, flags=re.S)


def table(results: list[Cell]) -> str:
    """Return the table of all families, and the reasons of refusals, in Markdown."""
    names = {"same": "yes", "different": "**no**"}
    by_family: dict[tuple[str, str], dict[str, Cell]] = {}
    reasons: dict[str, int] = {}
    for cell in results:
        by_family.setdefault((cell.kind, cell.family), {})[cell.scheme] = cell
    lines = [f"| family | kind | {' | '.join(SCHEMES)} |", f"|---|---|{'---|' * len(SCHEMES)}"]
    for (kind, family), row in by_family.items():
        marks = []
        for scheme in SCHEMES:
            cell = row[scheme]
            number = reasons.setdefault(general(cell), len(reasons) + 1) if cell.outcome == "refused" else 0
            marks.append(names.get(cell.outcome, f"refused ({number})"))
        lines.append(f"| {family} | {kind} | {' | '.join(marks)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", "Refusals:", "", *notes] if notes else lines)


def write_page(results: list[Cell]) -> None:
    """Put the table into its page."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}", encoding="utf-8")


def stored() -> list[Cell]:
    """Return the results so far, in the order of the families."""
    if not RESULTS.is_file():
        return []
    return [Cell(**cell) for cell in json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]]


def store(found: list[Cell]) -> None:
    """Write results in place of earlier ones of the same cells."""
    from zotune.llm.output.environment import environment

    place = {
        (kind, family): i for i, (kind, family) in enumerate((k, f) for k, part in families().items() for f in part)
    }
    cells = {(c.kind, c.family, c.scheme): c for c in [*stored(), *found]}
    known = [c for c in cells.values() if (c.kind, c.family) in place]
    known.sort(key=lambda c: (place[c.kind, c.family], SCHEMES.index(c.scheme)))
    content = {"environment": environment(), "cells": [asdict(cell) for cell in known]}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Run, and return 1 if a cell is neither the same nor refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    known = {(cell.kind, cell.family) for cell in stored()} if args.missing else set()
    found: list[Cell] = []
    for kind, members in families().items() if not args.page else ():
        for family in members:
            if (args.only and family not in args.only) or (kind, family) in known:
                continue
            now = list(cells(kind, family))
            found += now
            print(*(f"{c.family:22} {c.scheme:7} {c.outcome:9} {c.reason}" for c in now), sep="\n", flush=True)
            if not args.only:
                store(now)
    if not args.only:
        write_page(stored())
    return int(any(cell.outcome == "different" for cell in found))


if __name__ == "__main__":
    sys.exit(main())
