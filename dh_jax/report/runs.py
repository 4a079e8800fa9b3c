"""Read a run folder, as the trainer leaves it, into plain tuples; refuse what is broken."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import yaml

from dh_jax.errors import DataError
from dh_jax.report.teaching import named

T = TypeVar("T")

RUN_FILES = ("config.yaml", "metrics.jsonl", "timing.jsonl", "run.json")
STATUSES = ("finished", "interrupted", "running")


class TrainPoint(NamedTuple):
    """One logged training step. ``tokens`` and ``tokens_by_source`` count from the start."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    weights: dict[str, float]
    tokens_by_source: dict[str, float]
    batch: str | None = None  # checksum, where one was logged


class DomainLoss(NamedTuple):
    """Held-out loss of one domain: nats a target, bits a byte, number of targets."""

    loss: float
    bits_per_byte: float
    targets: int


class EvalPoint(NamedTuple):
    """Held-out losses of every domain after ``step`` steps."""

    step: int
    domains: dict[str, DomainLoss]


class ReweightPoint(NamedTuple):
    """One move of the mixture. ``influence`` is positive where a source harms the targets."""

    step: int
    influence: dict[str, float]
    weights: dict[str, float]
    coverage: float | None  # None, and no influence, where the policy measures none


class PhaseTime(NamedTuple):
    """Wall-clock seconds spent in one phase at one step."""

    step: int
    seconds: float
    phase: str


class ScoredDocument(NamedTuple):
    """A document and its influence on the target's loss; positive = harmful."""

    source: str
    id: str
    score: float
    text: str


class Documents(NamedTuple):
    """The scored documents of a run and the target they were scored against."""

    target: str  # names of the target probes
    documents: tuple[ScoredDocument, ...]
    scored: int | None = None  # of which these are the ends, if the file says


class Run(NamedTuple):
    """Everything a run folder says. ``notes`` are the oddities a reader must be told of."""

    folder: Path
    policy: str
    seed: int
    status: str
    targets: dict[str, float]
    parameters: int  # that were trained
    frozen: int  # beside them, under adapters
    device: str
    sources: tuple[str, ...]
    versions: dict[str, str]
    command: str | None
    config: dict[str, Any]
    config_text: str
    train: tuple[TrainPoint, ...]
    evals: tuple[EvalPoint, ...]
    reweights: tuple[ReweightPoint, ...]
    timings: tuple[PhaseTime, ...]
    documents: Documents | None
    notes: tuple[str, ...]

    @property
    def label(self) -> str:
        """The run's name in the report, for example ``influence, seed 0``."""
        return f"{self.policy}, seed {self.seed}"

    @property
    def tokens(self) -> int:
        """Tokens trained on at the last logged step."""
        return self.train[-1].tokens


def tokens_at(run: Run, steps: Sequence[int]) -> npt.NDArray[np.float64]:
    """Cumulative tokens after each of ``steps``: exact where logged, else in proportion."""
    last = run.train[-1]
    end = max([last.step, *steps])
    known_steps = [0, *(p.step for p in run.train)]
    known_tokens = [0.0, *(float(p.tokens) for p in run.train)]
    if end > last.step:
        known_steps.append(end)
        known_tokens.append(last.tokens * end / last.step)
    return np.interp(steps, known_steps, known_tokens)


def find_runs(folder: Path) -> list[Path]:
    """``folder`` itself where it holds a run, else its sub-folders that do, sorted by name.

    Raises:
        DataError: there is no run in it.
    """
    folder = Path(folder)
    if any((folder / name).exists() for name in RUN_FILES):
        return [folder]
    found = sorted(p.parent for p in folder.glob("*/metrics.jsonl"))
    if not found:
        raise DataError(f"no run in {folder}: expected {', '.join(RUN_FILES)} there or one below")
    return found


def load_run(folder: Path) -> Run:
    """Read one run folder.

    A half line at the end of a ``.jsonl`` file, as a killed run leaves it, is left out and
    told of in ``notes``; anything else that is broken is refused.

    Args:
        folder: the run's folder (config.yaml, metrics.jsonl, timing.jsonl, run.json, and
            documents.json where documents were scored).

    Raises:
        DataError: a file is missing or broken; the message names the file and the line.
    """
    folder = Path(folder)
    notes: list[str] = []
    config, config_text = _config(folder / "config.yaml")
    train, evals, reweights = _metrics(folder / "metrics.jsonl", notes)
    timings = tuple(
        PhaseTime(f.integer("step"), f.number("seconds"), f.text("phase"))
        for f in _lines(folder / "timing.jsonl", notes)
    )
    about = _Fields(_json(folder / "run.json"), str(folder / "run.json"))
    status = about.text("status")
    if status not in STATUSES:
        raise DataError(f"{about.where}: status {status!r} is none of {', '.join(STATUSES)}")
    settings = _Fields(config, str(folder / "config.yaml"))
    run = Run(
        folder=folder,
        policy=named(settings.inner("mixing").text("policy"), config),
        seed=settings.inner("training").integer("seed"),
        status=status,
        targets=about.numbers("targets"),
        parameters=about.integer("parameters"),
        frozen=about.integer("frozen") if "frozen" in about.record else 0,
        device=about.text("device"),
        sources=_sources(about, train),
        versions={k: str(v) for k, v in about.inner("versions").record.items()},
        command=about.optional("command"),
        config=config,
        config_text=config_text,
        train=train,
        evals=evals,
        reweights=reweights,
        timings=timings,
        documents=_documents(folder / "documents.json"),
        notes=tuple(notes),
    )
    _check_targets(run)
    return run


# --- the files -------------------------------------------------------------------------------


def _config(path: Path) -> tuple[dict[str, Any], str]:
    text = _read(path)
    try:
        config = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(f"{path}{line}: not YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected a mapping, got {type(config).__name__}")
    return config, text


def _metrics(
    path: Path, notes: list[str]
) -> tuple[tuple[TrainPoint, ...], tuple[EvalPoint, ...], tuple[ReweightPoint, ...]]:
    train: list[TrainPoint] = []
    evals: list[EvalPoint] = []
    reweights: list[ReweightPoint] = []
    unknown: Counter[str] = Counter()
    for fields in _lines(path, notes):
        kind = fields.text("kind")
        if kind == "train":
            _append(train, _train(fields), fields.where)
        elif kind == "eval":
            _append(evals, _eval(fields), fields.where)
        elif kind == "reweight":
            _append(reweights, _reweight(fields), fields.where)
        elif kind not in ("pace", "distillation"):  # moves show those, `teaching` reads these
            unknown[kind] += 1
    if not train:
        raise DataError(f"{path}: no 'train' record; the run has not logged a step yet")
    left = unknown.items()
    notes += [f"{path.name}: {n} records of unknown kind {k!r} left out" for k, n in left]
    return tuple(train), tuple(evals), tuple(reweights)


def _train(f: _Fields) -> TrainPoint:
    return TrainPoint(
        step=f.integer("step"),
        loss=f.number("loss"),
        grad_norm=f.number("grad_norm"),
        learning_rate=f.number("learning_rate"),
        tokens=f.integer("tokens"),
        weights=f.numbers("weights"),
        tokens_by_source=f.numbers("tokens_by_source"),
        batch=f.optional("batch"),
    )


def _eval(f: _Fields) -> EvalPoint:
    domains = f.inner("domains")
    losses = {}
    for name in domains.record:
        d = domains.inner(name)
        losses[name] = DomainLoss(d.number("loss"), d.number("bits_per_byte"), d.integer("targets"))
    if not losses:
        raise DataError(f"{f.where}: 'domains' is empty; an evaluation needs at least one")
    return EvalPoint(f.integer("step"), losses)


def _reweight(f: _Fields) -> ReweightPoint:
    return ReweightPoint(
        step=f.integer("step"),
        influence=f.numbers("influence") if "influence" in f.record else {},
        weights=f.numbers("weights"),
        coverage=f.number("coverage") if "coverage" in f.record else None,
    )


def _append(points: list[Any], point: Any, where: str) -> None:
    if points and point.step <= points[-1].step:
        raise DataError(
            f"{where}: step {point.step} after step {points[-1].step}; the log of a resumed run "
            "must be cut back to its checkpoint"
        )
    points.append(point)


def _documents(path: Path) -> Documents | None:
    if not path.exists():
        return None
    f = _Fields(_json(path), str(path))
    items = enumerate(f.get("documents", list))
    read = [_Fields(item, f"{path} document {number}") for number, item in items]
    documents = [
        ScoredDocument(d.text("source"), d.text("id"), d.number("score"), d.text("text"))
        for d in read
    ]
    return Documents(" and ".join(f.numbers("targets")), tuple(documents), f.record.get("scored"))


def _sources(about: _Fields, train: tuple[TrainPoint, ...]) -> tuple[str, ...]:
    sources = about.get("sources", list)
    missing = [name for name in train[0].weights if name not in sources]
    if missing:
        raise DataError(
            f"{about.where}: metrics name sources {', '.join(missing)}, which 'sources' lacks; "
            "the files are from different runs"
        )
    return tuple(str(name) for name in sources)


def _check_targets(run: Run) -> None:
    if not run.evals:
        return
    known = run.evals[-1].domains
    for point in run.evals:
        if set(point.domains) != set(known):
            raise DataError(
                f"{run.folder / 'metrics.jsonl'}: the evaluation at step {point.step} has domains "
                f"{', '.join(point.domains)}, the last one {', '.join(known)}"
            )
    for name in run.targets:
        if name not in known:
            raise DataError(
                f"{run.folder / 'run.json'}: target {name!r} is not an evaluated domain; "
                f"evaluated: {', '.join(known)}"
            )
    if run.targets and not sum(run.targets.values()) > 0:
        raise DataError(f"{run.folder / 'run.json'}: the weights of 'targets' must sum above 0")


# --- reading and checking --------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; a run folder holds {', '.join(RUN_FILES)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: not JSON ({error.msg})") from error


def _lines(path: Path, notes: list[str]) -> Iterator[_Fields]:
    """Records of a .jsonl file; a half last line without a line end is noted and left out."""
    lines = _read(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # nothing closed it: the writer was killed here
                notes.append(f"{path.name}: line {number} is cut off (a killed run); left out")
                return
            raise DataError(f"{where}: not JSON ({error.msg})") from error
        yield _Fields(record, where)


class _Fields:
    """A JSON object with typed access; every refusal names the place and the key."""

    def __init__(self, record: Any, where: str) -> None:
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: expected an object, got {type(record).__name__}")
        self.record: Mapping[str, Any] = record
        self.where = where

    def get(self, key: str, kind: type[T] | tuple[type[T], ...]) -> T:
        if key not in self.record:
            raise DataError(f"{self.where}: no {key!r}; found {', '.join(map(str, self.record))}")
        return _checked(self.record[key], kind, f"{self.where}: {key!r}")

    def number(self, key: str) -> float:
        return float(self.get(key, (int, float)))

    def integer(self, key: str) -> int:
        return self.get(key, int)

    def text(self, key: str) -> str:
        return self.get(key, str)

    def optional(self, key: str) -> str | None:
        return None if self.record.get(key) is None else self.text(key)

    def inner(self, key: str) -> _Fields:
        return _Fields(self.get(key, dict), f"{self.where}: {key!r}")

    def numbers(self, key: str) -> dict[str, float]:
        values = self.get(key, dict)
        place = f"{self.where}: {key!r}"
        return {n: float(_checked(v, (int, float), f"{place} {n!r}")) for n, v in values.items()}


def _checked(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where} is {value!r}, not {wanted}")
    return value
