"""What each command of ``dh`` does: composes, calls, prints. It computes nothing itself.

Modules are imported when a command needs them, so that ``dh --help`` stays quick.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dh_jax.errors import ConfigError

EXIT_INTERRUPTED = 130
PATIENCE = 1.0  # seconds of silence, of libraries that load, before a word is said
MOST_ROWS = 8  # that `dh inspect` decodes unasked, one of every source
SHOWN = 4000  # characters of a document that `dh show` prints unasked


_spoken = threading.Event()


def say_if_silent(command: str) -> None:
    """Say that libraries are loading, if nothing has been said when `PATIENCE` is over."""

    def say() -> None:
        if not _spoken.is_set():
            print(f"dh {command}: loading libraries", file=sys.stderr, flush=True)

    timer = threading.Timer(PATIENCE, say)
    timer.daemon = True  # a command that is done before does not wait for it
    timer.start()


def train(options: argparse.Namespace) -> int:
    train = module("train")
    run = train.check(module("compose").compose_run(options.overrides))
    if options.dry_run:
        with _waiting("compiling a step to price it"):
            price = module("pricing").price_run(run)
        if options.json:
            print(module("inspection.rows").to_json(price))
        else:
            module("console").print_price(price, _console())
        if options.command == "distill":
            _console(stderr=options.json).print(
                "of the student on cross-entropy; its teacher comes on top, unpriced"
            )
        return 0
    if run.resume and (facts := train.finished(run)):
        if options.json:
            print(json.dumps(facts))
        _console(stderr=options.json).print(
            f"{run.out} had finished, at step {facts['step']}: nothing is left to do"
        )
        return 0
    # Before anything touches a device; beside the first process none speaks but of errors.
    quiet = module("distributed.processes").join(run.mesh) > 0
    console = _console(quiet=quiet, stderr=options.json)
    with module("progress").TrainProgress(run.training.steps, console) as progress:
        command = " ".join([f"dh {options.command}", *options.overrides])
        facts = train.train(run, listeners=(progress,), command=command)
    if options.json and not quiet:
        print(json.dumps(facts))
    if facts["status"] != "finished":
        console.print(
            f"stopped at step {facts['step']}; go on with the same command and resume=true"
        )
        return EXIT_INTERRUPTED
    frozen = f" beside {facts['frozen']:,} frozen" if facts["frozen"] else ""
    console.print(
        f"finished: {facts['parameters']:,} parameters{frozen}, on {facts['device']}; "
        f"`dh report {run.out}` shows it", highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def influence(options: argparse.Namespace) -> int:
    schema = module("attribution.config").AttributionConfig
    config = module("compose").compose("attribution", schema, options.overrides)
    console, looks = _console(stderr=options.json), module("console")
    if options.dry_run:
        with _waiting("compiling a step to price it"):
            price = module("attribution.price").price_influence(config)
        if options.json:
            print(module("inspection.rows").to_json(price))
        else:
            looks.print_influence_price(price, console)
        return 0
    command = shlex.join(["dh", "influence", *options.overrides])
    score = module("attribution.command").influence
    try:
        with module("progress").InfluenceProgress(console) as progress:
            facts = score(config, listener=progress, command=command)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on behind the last whole shard")
        return EXIT_INTERRUPTED
    if options.json:
        print(json.dumps(facts))
    console.print(
        f"{facts['scored']:,} pieces of {facts['documents']:,} documents scored; "
        f"{facts['report']} shows them"
    )
    return 0


def mix(options: argparse.Namespace) -> int:
    config = module("compose").compose_search(options.overrides)
    search, folder = module("search"), Path(config.out)
    console = _console(stderr=options.json)
    try:
        with module("progress").SearchProgress(console, search.plan_of(config)) as progress:
            finding = search.find_weights(config, progress)
    except KeyboardInterrupt:
        console.print("interrupted; go on with the same command and resume=true")
        return EXIT_INTERRUPTED
    search.write_search_report(config, finding, folder / "report.html")
    if options.json:
        print(module("inspection.rows").to_json(finding))
    module("console").print_finding(finding, console)
    console.print(f"`dh train data={folder / 'data.yaml'}` takes them; {folder / 'report.html'}")
    return 0


def distill(options: argparse.Namespace) -> int:
    caching = options.overrides[:1] == ["cache"]
    distilling, compose = module("distilling"), module("compose")
    options.overrides = distilling.with_defaults(options.overrides[1 if caching else 0 :])
    if not caching:
        distilling.refuse_without_teacher(compose.compose_run(options.overrides))
        return train(options)
    console, run = _console(stderr=options.json), compose.compose_run(options.overrides)
    total = distilling.tokens_to_cache(run)
    try:
        with module("progress").CacheProgress(console, total) as progress:
            cached = distilling.make_cache(run, progress)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on behind the last whole shard")
        return EXIT_INTERRUPTED
    entries = sum(shard["entries"] for shard in cached.manifest["shards"])
    size = sum(path.stat().st_size for path in cached.folder.rglob("*.safetensors"))
    if options.json:
        facts = {"cache": str(cached.folder), "pieces": len(cached), "tokens": entries}
        print(json.dumps(facts | {"bytes": size}))
    console.print(
        f"{cached.folder}: {len(cached):,} pieces, {entries:,} tokens, "
        f"{size / max(entries, 1):.1f} bytes a token"
    )
    return 0


def prepare(options: argparse.Namespace) -> int:
    run = module("compose").compose_run(options.overrides)
    console = _console(stderr=options.json)
    start = time.perf_counter()
    with module("progress").PrepareProgress(console) as progress:
        store = module("data.prepare").prepare(run.data, backend=options.backend, progress=progress)
    seconds = time.perf_counter() - start
    verified = store.verify() if options.verify else None
    if options.json:
        totals = {"store": str(store.folder), "seconds": round(seconds, 3), "verified": verified}
        print(json.dumps({**totals, "sources": store.totals()}))
        return 0
    module("console").print_store(store, console)
    if verified is not None:
        console.print(f"{verified} shards verified")
    return 0


def inspect(options: argparse.Namespace) -> int:
    run = module("compose").compose_run(options.overrides)
    found = module("inspection.preview").preview(
        run.data, split=options.split, batches=options.batches,
        rows=min(len(run.data.sources), MOST_ROWS) if options.rows is None else options.rows,
        documents=options.documents,
    )  # fmt: skip
    if options.html is not None:
        module("inspection.page").write_preview(found, run.data, options.html)
        print(options.html)
    elif options.json:
        print(module("inspection.rows").to_json(found))
    else:
        module("inspection.terminal").print_preview(found, _console())
    return 0


def show(options: argparse.Namespace) -> int:
    lookup, rows = module("inspection.lookup"), module("inspection.rows")
    document = rows.parse_document(options.document)
    run = module("compose").compose_run(options.overrides)
    with _console(stderr=True).status("looking for the document") as status:

        def progress(source: str, documents: int) -> None:
            status.update(f"reading {source}: {documents:,} documents")

        found = lookup.find_document(run.data, document, progress=progress)
        if found.where is None and not options.no_record:
            found = lookup.find_record(run.data, found, progress=progress)
    if options.json:
        print(rows.to_json(found))
    else:
        most = None if options.whole else SHOWN
        module("inspection.terminal").print_found(found, _console(), most)
    return 0


def replay(options: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the run may still hold the accelerator
    with _console(stderr=True).status("reading the run") as status:
        found = module("inspection.replay").replay(
            options.folder, options.step, store=options.store, rows=options.row,
            progress=lambda step: status.update(f"replaying step {step:,} of {options.step:,}"),
        )  # fmt: skip
    if options.json:
        print(module("inspection.rows").to_json(found, without=("batch", "origins")))
    else:
        module("inspection.terminal").print_replay(found, _console())
    return 0


def report(options: argparse.Namespace) -> int:
    module("report").write_report(options.runs, options.out, title=options.title)
    print(options.out)
    return 0


def convert(options: argparse.Namespace) -> int:
    folder = module("models.gguf").convert_gguf(
        options.file, options.out, tokenizer=options.tokenizer, dtype=options.dtype
    )
    module("console").print_folder(folder, _console())
    return 0


def generate(options: argparse.Namespace) -> int:
    prompts = options.prompts or [sys.stdin.read().removesuffix("\n")]
    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}; the least is 1")
    completion, console = module("completion"), module("console")
    with _waiting("reading the model"):
        model = completion.open_model(
            options.model, tokenizer=options.tokenizer, dtype=options.dtype
        )
    sampling = module("models.generation").Sampling(
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


def export(options: argparse.Namespace) -> int:
    folder = module("export").export_run(
        options.folder, options.out, dtype=options.dtype, adapters=options.adapters
    )
    module("console").print_folder(folder, _console())
    return 0


def configs(options: argparse.Namespace) -> int:
    config = module("config")
    if options.show:
        shown = module("compose").show(options.overrides)
        print(json.dumps(shown) if options.json else module("compose").as_yaml(shown), end="")
        return 0
    groups = config.describe_configs()
    if options.json:
        names = {group: list(configs) for group, configs in groups.items()}
        facts = {"folder": str(config.config_folder()), "groups": names, "about": groups}
        print(json.dumps(facts))
        return 0
    print(config.config_folder())
    for group, configs in groups.items():
        print(f"\n{group}=")
        for name, about in configs.items():
            print(f"  {name:<18} {about}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    found = module("doctor").examine(options.addresses)
    if options.json:
        print(json.dumps(found))
    else:
        module("console").print_examination(found, _console(highlight=False))
    return 1 if found["problems"] else 0


def completion(options: argparse.Namespace) -> int:
    configs = module("config").list_configs()
    parser = module("cli").build_parser()
    print(module("shell_words").completion_script(options.shell, parser, configs), end="")
    return 0


def demo(options: argparse.Namespace) -> int:
    if options.seeds < 1:
        raise ConfigError(f"--seeds is {options.seeds}; the least is 1")
    demo = module("demo.study")
    report = demo.run_demo(
        options.folder, steps=options.steps, seeds=options.seeds, console=_console()
    )
    print(report)
    return 0


def module(name: str) -> Any:
    """A module of the library, imported when a command needs it: `--help` stays quick."""
    return importlib.import_module(f"dh_jax.{name}")


def _waiting(said: str) -> Any:
    return module("progress").waiting(_console(stderr=True), said)


def _console(**settings: Any) -> Any:
    _spoken.set()
    return importlib.import_module("rich.console").Console(**settings)
