"""`zotune ledger …`: show a fine-tune's ledger, check it, rebuild weights from it, undo steps, put several together."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_EXAMPLES = """
examples:
  zotune ledger show runs/a
  zotune ledger verify runs/a
  zotune ledger replay runs/a --step 500 --output-dir runs/a-500
  zotune ledger undo runs/a --to-step 500
  zotune ledger export runs/a --output-dir merged --merged
  zotune ledger merge runs/a runs/b runs/c --average --output-dir runs/mean
"""


def run(args: Sequence[str], as_json: bool) -> int:
    """Run a ledger command; the exit code."""
    chosen = _parser().parse_args(args)
    found, text, code = chosen.run(chosen)
    print(json.dumps(found, indent=2) if as_json else text)  # noqa: T201
    return int(code)


Answer = tuple[dict[str, Any], str, int]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zotune ledger", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Answer], text: str, *, writes: bool) -> Any:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("path", type=Path, help="a run's folder, or a ledger file")
        if name != "show":
            command.add_argument("--base", help="the base model, where it is not found under the name in the ledger")
            command.add_argument("--device", help="cpu, cuda, …; default: the run's")
        if writes:
            command.add_argument("--output-dir", type=Path, required=True, help="where to write the model")
            command.add_argument("--max-shard-size", help="of a file of whole weights, as 5GB; default: transformers'")
        return command

    show = add("show", _show, "a table of the steps, and a plot of loss and coefficients", writes=False)
    show.add_argument("--rows", type=int, default=20, help="rows of the table at most")
    add("verify", _verify, "check checksums and base, and by replaying that the saved weights are these", writes=False)
    for name, text in (
        ("replay", "rebuild the weights with no data and no forward pass"),
        ("export", "as replay; --merged puts an adapter into the model's weights"),
    ):
        command = add(name, _replay, text, writes=True)
        command.add_argument("--step", type=int, help="after so many steps; default: all")
        command.add_argument("--merged", action="store_true", help=argparse.SUPPRESS if name == "replay" else None)
    undo = add("undo", _undo, "bring a run's folder back to an earlier step", writes=False)
    undo.add_argument("--to-step", type=int, required=True, help="how many steps stay")
    merge = add("merge", _merge, "put several runs together: one after the other, or their mean", writes=True)
    merge.add_argument("others", type=Path, nargs="+", help="the other runs")
    merge.add_argument("--average", action="store_true", help="the mean of runs from one base; default: in a row")
    return parser


def _show(args: argparse.Namespace) -> Answer:
    from zotune.llm.ledger.rebuild import find_ledger, plot, summary

    ledger = find_ledger(args.path)
    found = summary(ledger)
    records = list(ledger)
    lines = [f"{key}: {value}" for key, value in found.items() if value is not None]
    stride = max(1, -(-len(records) // max(args.rows, 1)))
    lines += ["", f"{'step':>8} {'loss':>12} {'rate':>12} {'scale':>6}  coefficients"]
    for record in records[::stride]:
        scales = ",".join(f"{s:g}" for s in record.scales[:3])
        coefficients = " ".join(f"{c:.5g}" for c in record.coefficients[:6])
        more = " …" if len(record.coefficients) > 6 else ""
        rate = record.learning_rates[0]
        lines.append(f"{record.step + 1:>8} {record.loss:>12.6g} {rate:>12.6g} {scales:>6}  {coefficients}{more}")
    if records:
        lines += ["", "loss", plot([r.loss for r in records])]
        lines += ["", "coefficient (the first)", plot([r.coefficients[0] for r in records])]
    if ledger.cut_bytes:
        lines += ["", f"{ledger.cut_bytes} bytes at the end are torn or damaged; they are no part of the ledger"]
    return found, "\n".join(lines), 0


def _verify(args: argparse.Namespace) -> Answer:
    from zotune.llm.ledger.verify import verify

    found = verify(args.path, args.base, args.device)
    lines = [f"{found.num_steps} steps with good checksums, of this base model"]
    if found.cut_bytes:
        lines.append(f"{found.cut_bytes} bytes at the end are torn or damaged; they are no part of the ledger")
    if not found.num_tensors:
        lines.append("no weights are saved beside the ledger, so none were compared")
    elif found.different:
        lines.append(f"{len(found.different)} of {found.num_tensors} saved tensors are NOT the ledger's: ")
        lines[-1] += ", ".join(found.different[:5])
    else:
        lines.append(f"all {found.num_tensors} saved tensors are the ledger's, bit for bit")
    return vars(found), "\n".join(lines), 1 if found.different else 0


def _replay(args: argparse.Namespace) -> Answer:
    from zotune.errors import UsageError
    from zotune.llm.ledger.merge import Merge, find_fine_tune, rebuild_any
    from zotune.llm.ledger.rebuild import check_empty, export

    found = find_fine_tune(args.path)
    if not isinstance(found, Merge):
        found = found.first(args.step)
    elif args.step is not None:
        raise UsageError(f"{args.path} holds a merge, of which there is no --step; replay one of its ledgers.")
    size = _shard_size(args.max_shard_size)
    check_empty(args.output_dir)
    export(rebuild_any(found, args.base, args.device), args.output_dir, merged=args.merged, max_shard_size=size)
    return _saved(args.output_dir, len(found))


def _undo(args: argparse.Namespace) -> Answer:
    from zotune.llm.ledger.rebuild import undo

    undo(args.path, args.to_step, args.base, args.device)
    return _saved(args.path, args.to_step)


def _merge(args: argparse.Namespace) -> Answer:
    from zotune.llm.ledger.merge import Merge
    from zotune.llm.ledger.rebuild import check_empty, find_ledger
    from zotune.llm.training.output_folder import staged_folder

    ledgers = tuple(find_ledger(path) for path in (args.path, *args.others))
    merge = Merge("average" if args.average else "row", ledgers)
    size = _shard_size(args.max_shard_size)
    check_empty(args.output_dir)
    rebuilt = merge.rebuild(args.base, args.device)
    with staged_folder(args.output_dir) as aside:
        rebuilt.write(aside, size)
        merge.write(aside)
    return _saved(args.output_dir, len(merge))


def _shard_size(given: str | None) -> str:
    from zotune.llm.models.safetensors_shards import MAX_SHARD_SIZE, check_shard_size

    return MAX_SHARD_SIZE if given is None else check_shard_size(given)


def _saved(folder: Path, num_steps: int) -> Answer:
    from zotune.system.peak_memory import peak_memory

    peak = peak_memory()
    found = {"output_dir": str(folder), "num_steps": num_steps, "peak_memory": peak}
    return found, f"{num_steps} steps replayed, peak memory {peak / 2**20:.0f} MiB; saved in {folder}", 0
