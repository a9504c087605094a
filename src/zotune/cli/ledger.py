"""`zotune ledger`: show a fine-tune's ledger, verify it, rebuild weights from it, undo steps, and merge fine-tunes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from zotune.cli.subcommands import Command, CommandParser, CommandResult, VerbParser
from zotune.messages import one_line

_DESCRIPTION = """Work with the ledger of a fine-tune: the few kilobytes from which zotune
rebuilds the tuned weights with no data and no forward pass."""
_EXAMPLES = (
    "zotune ledger show runs/a",
    "zotune ledger verify runs/a",
    "zotune ledger replay runs/a --step 500 --output-dir runs/a-500",
    "zotune ledger undo runs/a --to-step 500",
    "zotune ledger export runs/a --output-dir merged --merged",
    "zotune ledger merge runs/a runs/b runs/c --average --output-dir runs/mean",
)


def run(args: Sequence[str], as_json: bool) -> int:
    """Run a ledger command and return the exit code."""
    return _parser().run_command(args, as_json)


def _parser() -> VerbParser:
    parser = VerbParser("zotune ledger", _DESCRIPTION, _EXAMPLES)

    def add(name: str, run: Command, text: str, *, writes: bool) -> CommandParser:
        command = parser.add_command(name, run, text)
        command.add_argument("path", metavar="RUN", type=Path, help="Folder of a run, or a ledger file.")
        if name != "show":
            command.add_argument(
                "--base", metavar="MODEL", help="Base model; default: the model that the ledger names."
            )
            command.add_argument("--device", help="Device, such as cpu or cuda; default: a GPU if there is one.")
        if writes:
            command.add_argument(
                "--output-dir", metavar="FOLDER", type=Path, required=True, help="New folder for the model."
            )
            command.add_argument(
                "--max-shard-size",
                metavar="SIZE",
                help="Largest file of whole weights, such as 5GB; default: as in transformers.",
            )
        return command

    show = add("show", _show, "Print a table of the steps, and plots of loss and coefficients.", writes=False)
    show.add_argument(
        "--rows", metavar="N", type=int, default=20, help="Largest number of rows of the table; default: 20."
    )
    add("verify", _verify, "Check the ledger's checksums and base, and the saved weights by replaying.", writes=False)
    for name, text in (
        ("replay", "Rebuild the weights with no data and no forward pass."),
        ("export", "As replay; with --merged, merge an adapter into the model's weights."),
    ):
        command = add(name, _replay, text, writes=True)
        command.add_argument("--step", metavar="N", type=int, help="Number of steps to replay; default: all.")
        merged_help = argparse.SUPPRESS if name == "replay" else "Merge the adapter into the model's weights."
        command.add_argument("--merged", action="store_true", help=merged_help)
    undo = add("undo", _undo, "Return a run's folder to an earlier step.", writes=False)
    undo.add_argument("--to-step", metavar="N", type=int, required=True, help="Number of steps to keep.")
    merge = add(
        "merge", _merge, "Combine several runs: their steps in sequence, or the mean of their weights.", writes=True
    )
    merge.add_argument("others", metavar="RUN", type=Path, nargs="+", help="The other runs.")
    merge.add_argument(
        "--average", action="store_true", help="Take the mean of runs from one base; default: apply them in sequence."
    )
    return parser


def _show(args: argparse.Namespace) -> CommandResult:
    from zotune.llm.ledger.rebuild import find_ledger, plot, summary

    ledger = find_ledger(args.path)
    properties = summary(ledger)
    records = list(ledger)
    lines = [one_line(f"{key}: {value}") for key, value in properties.items() if value is not None]
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
        lines += ["", "first coefficient", plot([r.coefficients[0] for r in records])]
    if ledger.cut_bytes:
        lines += ["", _cut_bytes(ledger.cut_bytes)]
    return properties, "\n".join(lines), 0


def _cut_bytes(count: int) -> str:
    return f"{count} bytes at the end are torn or damaged; they do not belong to the ledger"


def _verify(args: argparse.Namespace) -> CommandResult:
    from zotune.errors import listed
    from zotune.llm.ledger.verify import verify

    result = verify(args.path, args.base, args.device)
    lines = [f"{result.num_steps} steps with correct checksums, of this base model"]
    if result.cut_bytes:
        lines.append(_cut_bytes(result.cut_bytes))
    if not result.num_tensors:
        lines.append("no weights are saved beside the ledger, so none were compared")
    elif result.is_right:
        lines.append(f"all {result.num_tensors} saved tensors are the ledger's, bit for bit")
    for names, text in (
        (result.different, f"of {result.num_tensors} saved tensors are NOT the ledger's"),
        (result.missing, "tensors of the model are NOT saved"),
        (result.unexpected, "saved tensors are NOT of the ledger's model"),
    ):
        if names:
            lines.append(f"{len(names)} {text}: {listed(names, 5)}")
    return vars(result), "\n".join(lines), 0 if result.is_right else 1


def _replay(args: argparse.Namespace) -> CommandResult:
    from zotune.llm.ledger.merge import find_fine_tune, rebuild_any
    from zotune.llm.ledger.rebuild import export_into
    from zotune.llm.output.locked_folder import new_folder

    fine_tune = find_fine_tune(args.path, args.step)
    size = _shard_size(args.max_shard_size)
    with new_folder(args.output_dir) as folder:
        rebuilt = rebuild_any(fine_tune, args.base, args.device)
        export_into(folder, rebuilt, merged=args.merged, max_shard_size=size)
    return _saved(args.output_dir, len(fine_tune))


def _undo(args: argparse.Namespace) -> CommandResult:
    from zotune.llm.ledger.undo import undo

    undo(args.path, args.to_step, args.base, args.device)
    return _saved(args.path, args.to_step)


def _merge(args: argparse.Namespace) -> CommandResult:
    from zotune.llm.ledger.merge import Merge
    from zotune.llm.ledger.rebuild import find_ledger
    from zotune.llm.output.locked_folder import new_folder

    ledgers = tuple(find_ledger(path) for path in (args.path, *args.others))
    merge = Merge("average" if args.average else "row", ledgers)
    size = _shard_size(args.max_shard_size)
    with new_folder(args.output_dir) as folder:
        rebuilt = merge.rebuild(args.base, args.device)
        with folder.staged() as staging:
            rebuilt.write(staging, size)
            merge.write(staging)
    return _saved(args.output_dir, len(merge))


def _shard_size(text: str | None) -> str:
    from zotune.llm.checkpoints.safetensors_shards import MAX_SHARD_SIZE, check_shard_size

    return MAX_SHARD_SIZE if text is None else check_shard_size(text)


def _saved(folder: Path, num_steps: int) -> CommandResult:
    from zotune.system.peak_memory import peak_memory

    peak = peak_memory()
    value = {"output_dir": str(folder), "num_steps": num_steps, "peak_memory": peak}
    return value, f"{num_steps} steps replayed, peak memory {peak / 2**20:.0f} MiB; saved in {folder}", 0
