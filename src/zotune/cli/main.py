"""The `zotune` command. Results on stdout, everything else on stderr.

Exit codes: 0 done · 1 the run failed · 2 bad usage or config · 130/143 interrupted, what there is saved.
Heavy libraries are imported by the commands that need them, so that help comes at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from zotune.errors import UsageError, ZotuneError, did_you_mean

_HELP = """usage: zotune COMMAND …

Fine-tune language models with forward passes only, at the memory of inference.

commands:
  train [RECIPE] --OPTION …   fine-tune; options override the recipe (a YAML file, or a shipped one's name)
  train … --dry-run           what that would read, tune and take; starts nothing, writes nothing
  eval --model M --task T …   accuracy, or F1 of generated answers, with its 95 % interval
  plan --model M              will it fit? memory (and time) of each method, before running
  bench COMMAND               list, run and look at the paper's tables and figures, and the leaderboard
  ledger COMMAND RUN          show, verify, replay, undo, export or merge fine-tunes as kilobytes
  models                      the models there are by name
  tasks                       the tasks there are by name
  methods                     the methods there are by name
  env                         versions, processor, GPU, cache

`zotune COMMAND --help` shows a command's options. Every command takes --json: one JSON object on stdout.
Start with: zotune train sst2-smollm2
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    if argv is None and sys.argv[1:2] in (["train"], ["eval"]) and not {"-h", "--help", "--dry-run"} & {*sys.argv}:
        from zotune.system.malloc import restart_with_heap_environment

        restart_with_heap_environment()
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run a command; the exit code."""
    # Let torch's threads wait by spinning for some 50 µs, not milliseconds: as fast where the processor is idle,
    # and no standstill where it has other work. GNU's OpenMP reads this as it loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        return _dispatch(argv)
    except (ZotuneError, ImportError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, ZotuneError) and not is_out_of_memory(error):
            raise
        message, code = _explain(error)
        print(f"zotune: {message}", file=sys.stderr)  # noqa: T201
        return code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP, end="")  # noqa: T201
        return 0
    verb, *rest = argv
    if verb == "--version":
        import zotune

        print(f"zotune {zotune.__version__}")  # noqa: T201
        return 0
    if verb not in _COMMANDS:
        raise UsageError(f"there is no command {verb!r}.{did_you_mean(verb, _COMMANDS)}")
    return _COMMANDS[verb]([a for a in rest if a != "--json"], "--json" in rest)


def _explain(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit code it means."""
    if isinstance(error, ZotuneError):
        return str(error), 2 if isinstance(error, UsageError) else 1
    if isinstance(error, ImportError):
        return f"{error}. The command line needs its extra: pip install 'zotune[llm]'", 1
    if is_out_of_memory(error):
        return "out of memory. Try a smaller batch (--per-device-train-batch-size), bfloat16, or a smaller model.", 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    where = getattr(error, "filename", None)
    return f"{getattr(error, 'strerror', None) or error}{f': {where}' if where else ''}", 1


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own error, or torch's, which for the CPU has no class of its own."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _train(args: list[str], as_json: bool) -> int:
    from zotune.llm.config.run import TrainConfig, find_recipe, read_recipe

    recipe: dict[str, Any] = {}
    source = "command line"
    is_dry = "--dry-run" in args
    args = [a for a in args if a != "--dry-run"]
    if args and not args[0].startswith("-"):
        path = find_recipe(args[0])
        recipe, source, args = read_recipe(path), str(path), args[1:]
    config = _parse(TrainConfig, recipe, source, args, "zotune train")
    if is_dry:
        return _dry_run(config, as_json)
    from zotune.llm.training.train import train
    from zotune.system.malloc import tune_malloc

    tune_malloc()
    result = train(config)
    _write_page(result.output_dir)
    if as_json:
        _print_json(result.to_json())
    else:
        for name, found in (("held-out rows before", result.dev_before), ("held-out rows", result.dev)):
            if found is not None:
                print(f"{name}: {found}")  # noqa: T201
        if result.test is not None and result.test is not result.dev:
            print(f"evaluation rows: {result.test}")  # noqa: T201
        print(  # noqa: T201
            f"{result.num_steps} steps, {result.num_forwards} forward passes, {result.seconds:.0f} s, "
            f"peak memory {result.peak_memory / 2**20:.0f} MiB\nsaved in {result.output_dir}"
        )
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def _write_page(folder: Path) -> None:
    """The run's page beside its results; without the extra that pages need there is none, and no run fails for it."""
    try:
        from zotune.bench.report.run_html import write_run_page
    except ImportError:
        return
    try:
        write_run_page(folder)
    except OSError as error:
        print(f"zotune: the run's page could not be written: {error.strerror}", file=sys.stderr)  # noqa: T201


def _dry_run(config: Any, as_json: bool) -> int:
    from zotune.plan.dry_run import dry_run

    found = dry_run(config)
    if as_json:
        _print_json(found.to_json())
    else:
        print(found)  # noqa: T201
    return 2 if found.refused else 0


def _eval(args: list[str], as_json: bool) -> int:
    from zotune.llm.config.run import EvalConfig, inherited_options

    config = _parse(EvalConfig, {}, "command line", args, "zotune eval")
    inherited, source = inherited_options(config)
    if inherited:
        config = _parse(EvalConfig, inherited, source, args, "zotune eval")
    from zotune.llm.training.evaluation import evaluate
    from zotune.llm.training.output_folder import write_json
    from zotune.system.malloc import OWN_PAGES_OF_PASSES, tune_malloc

    tune_malloc(OWN_PAGES_OF_PASSES)
    found, results = evaluate(config)
    if config.output_dir is not None:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(config.output_dir / "results.json", results)
    if as_json:
        _print_json(results)
    else:
        for task, one in found.items():
            print("\n".join([f"{task}:"] * (len(found) > 1) + one.lines()))  # noqa: T201
    return 0


def _plan(args: list[str], as_json: bool) -> int:
    from zotune.plan.options import PlanConfig

    args = ["--per-device-train-batch-size" if a == "--batch-size" else a for a in args]
    args = [a.replace("--batch-size=", "--per-device-train-batch-size=", a.startswith("--batch-size=")) for a in args]
    config = _parse(PlanConfig, {}, "command line", _joined(args, "--method"), "zotune plan")
    from zotune.plan.planning import plan
    from zotune.plan.report import show

    found = plan(config)
    if as_json:
        _print_json(found.to_json())
    else:
        show(found)
    return 0


def _joined(args: list[str], option: str) -> list[str]:
    """`--task a b` as `--task a,b`."""
    if option not in args:
        return args
    start = args.index(option) + 1
    stop = next((i for i in range(start, len(args)) if args[i].startswith("-")), len(args))
    return [*args[:start], ",".join(args[start:stop]), *args[stop:]] if stop > start else args


def _parse(schema: Any, recipe: dict[str, Any], source: str, args: list[str], prog: str) -> Any:
    """Options over a recipe over defaults, as one validated record."""
    import tyro

    from zotune.llm.config.schema import validate

    recipe = validate(schema, recipe, source, partial=True).model_dump()
    if any(a.replace("_", "-").startswith(("--train-file", "--eval-file")) for a in args):
        # Files of one's own take the place of the recipe's task.
        recipe["task"] = None
    # tyro reads the options into a record without rules, so that every complaint about a value is worded in one place.
    fields = [
        (
            name,
            Annotated[info.annotation, tyro.conf.arg(help=info.description)],
            dataclasses.field(default_factory=functools.partial(recipe.get, name)),
        )
        for name, info in schema.model_fields.items()
    ]
    options = dataclasses.make_dataclass(schema.__name__, fields, frozen=True)
    args = _joined([a.replace("--zo-eps", "--mu").replace("--zo_eps", "--mu") for a in args], "--task")
    chosen: Any = tyro.cli(options, args=args, prog=prog, description=schema.__doc__)
    return validate(schema, dataclasses.asdict(chosen), "command line")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))  # noqa: T201


def _list(rows: dict[str, str], as_json: bool) -> int:
    if as_json:
        _print_json(rows)
    else:
        width = max(map(len, rows))
        for name, text in rows.items():
            print(f"{name.ljust(width)}  {text}".rstrip())  # noqa: T201
    return 0


def _ledger(args: list[str], as_json: bool) -> int:
    from zotune.cli.ledger import run

    return run(args, as_json)


def _bench(args: list[str], as_json: bool) -> int:
    from zotune.cli.bench import run

    return run(args, as_json)


def _models(args: list[str], as_json: bool) -> int:
    _no_options("models", args)
    from zotune.llm.models.builtin import BUILT_IN
    from zotune.llm.models.random_models import ARCHITECTURES

    rows = {name: model.description for name, model in BUILT_IN.items()}
    rows |= {f"random:{name}": "architecture with random weights, for memory and speed" for name in ARCHITECTURES}
    return _list({**rows, "HUB/ID or FOLDER": "any causal or masked language model of transformers"}, as_json)


def _tasks(args: list[str], as_json: bool) -> int:
    _no_options("tasks", args)
    from zotune.llm.tasks import TASKS

    return _list({name: f"{task.description}; licence: {task.licence}" for name, task in TASKS.items()}, as_json)


def _methods(args: list[str], as_json: bool) -> int:
    _no_options("methods", args)
    from zotune.methods.paper import METHODS

    rows = {name: (method.__doc__ or "").splitlines()[0] for name, method in METHODS.items()}
    rows |= {
        "fo_sgd": "first-order baseline: SGD by back-propagation",
        "fo_adam": "first-order baseline: Adam by back-propagation",
    }
    return _list(rows, as_json)


def _env(args: list[str], as_json: bool) -> int:
    _no_options("env", args)
    from zotune.llm.training.output_folder import environment
    from zotune.system.cache_dir import cache_folder

    return _list({**environment(), "processors": str(os.cpu_count()), "cache": str(cache_folder())}, as_json)


def _no_options(verb: str, args: list[str]) -> None:
    if args and args[0] in ("-h", "--help"):
        print(f"usage: zotune {verb} [--json]")  # noqa: T201
        raise SystemExit(0)
    if args:
        raise UsageError(f"zotune {verb} takes no option but --json, got {args[0]!r}.")


_COMMANDS: dict[str, Callable[[list[str], bool], int]] = {
    "train": _train,
    "eval": _eval,
    "plan": _plan,
    "ledger": _ledger,
    "bench": _bench,
    "models": _models,
    "tasks": _tasks,
    "methods": _methods,
    "env": _env,
}

if __name__ == "__main__":
    main()
