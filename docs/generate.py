"""Pages of the documentation that are made from the code: configuration, API, notebooks.

The reference of configs is read from the schemas' source: names, types and defaults are the
dataclasses', and a field's meaning is the comment beside it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import tokenize
from pathlib import Path
from typing import NamedTuple

from dh_jax import cli, distillation_schema, schema
from dh_jax.attribution import config as attribution
from dh_jax.config import list_configs
from dh_jax.search import config as search

ROOT = Path(__file__).resolve().parents[1]
# Module -> heading; the modules whose names a user imports.
API = {
    "The ground floor": ("dh_jax.batch", "dh_jax.errors", "dh_jax.functions", "dh_jax.config"),
    "Data": (
        "dh_jax.data.loader", "dh_jax.data.tokenization",
        "dh_jax.data.sources", "dh_jax.data.packing", "dh_jax.data.mixing",
        "dh_jax.data.datasets.pretrain", "dh_jax.data.datasets.sft", "dh_jax.data.store",
        "dh_jax.data.prepare",
    ),
    "Models": (
        "dh_jax.models.decoder", "dh_jax.models.pretrained", "dh_jax.models.lora",
        "dh_jax.models.generation", "dh_jax.completion",
    ),
    "Influence": (
        "dh_jax.influence.calculator", "dh_jax.influence.optimizer", "dh_jax.influence.objective",
        "dh_jax.influence.estimator", "dh_jax.influence.ekfac", "dh_jax.influence.first_order",
        "dh_jax.influence.projection", "dh_jax.influence.score_store", "dh_jax.attribution.command",
    ),
    "Mixing": (
        "dh_jax.mixing.policy", "dh_jax.mixing.registry", "dh_jax.mixing.schedules",
        "dh_jax.mixing.influence", "dh_jax.mixing.odm", "dh_jax.mixing.doremi",
        "dh_jax.mixing.simplex",
    ),
    "Distillation": (
        "dh_jax.distillation.losses", "dh_jax.distillation.teacher",
        "dh_jax.distillation.objective", "dh_jax.distillation.cached",
        "dh_jax.distillation.caching", "dh_jax.distillation.inside",
        "dh_jax.distillation.universal", "dh_jax.models.states",
    ),
    "Runs": (
        "dh_jax.train", "dh_jax.step", "dh_jax.distributed.mesh", "dh_jax.distributed.checkpoint",
        "dh_jax.report.page", "dh_jax.compose",
    ),
    "Figures": ("dh_jax.viz.batches", "dh_jax.viz.measured", "dh_jax.viz.figures",
                "dh_jax.viz.notebook"),
    "The torch bridge": (
        "dh_torch_bridge.data", "dh_torch_bridge.distillation", "dh_torch_bridge.influence",
        "dh_torch_bridge.pieces",
        "dh_torch_bridge.optimizer", "dh_torch_bridge.teacher", "dh_torch_bridge.runstate",
        "dh_torch_bridge.pretrained", "dh_torch_bridge.exchange", "dh_torch_bridge.losses",
        "dh_torch_bridge.plan", "dh_torch_bridge.distributed.mesh",
        "dh_torch_bridge.distributed.parallelize", "dh_torch_bridge.distributed.checkpoint",
    ),
}  # fmt: skip
# Group of configs -> the schema behind it.
GROUPS = {
    "data": schema.DataConfig,
    "model": schema.ModelConfig,
    "mixing": schema.MixingConfig,
    "influence": schema.InfluenceConfig,
    "distillation": distillation_schema.DistillationConfig,
    "training": schema.TrainingConfig,
    "mesh": schema.MeshConfig,
    "distributed": schema.DistributedConfig,
    "estimator": attribution.EstimatorConfig,
    "search": search.SearchConfig,
}
ROOTS = {
    "dh train, dh distill": schema.RunConfig,
    "dh influence": attribution.AttributionConfig,
    "dh mix": search.SearchRunConfig,
    "dh_torch_bridge.train": schema.TorchRunConfig,
}


class Field(NamedTuple):
    """One key of a config."""

    name: str
    kind: str
    default: str
    meaning: str


def everything(out: Path) -> None:
    """Write every page that is made; those that are no longer made go."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "api").mkdir(parents=True)
    (out / "configuration.md").write_text(configuration(), encoding="utf-8")
    names = []
    for heading, modules in API.items():
        name = heading.lower().replace(" ", "-")
        names.append(name)
        (out / "api" / f"{name}.rst").write_text(api_page(heading, modules), encoding="utf-8")
    (out / "commands.md").write_text(commands(), encoding="utf-8")
    (out / "readme_migration.md").write_text(part_of_readme("## Where the older"), "utf-8")
    (out / "readme_exact.md").write_text(part_of_readme("## What is exact here"), "utf-8")
    for notebook in sorted((ROOT / "notebooks").glob("[0-9]_*.ipynb")):
        shutil.copy(notebook, out / notebook.name)


def part_of_readme(heading: str) -> str:
    """The README's text below a heading, to the next one of its level."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text.index("\n", text.index(f"\n{heading}") + 1)
    ends = [i for mark in ("\n## ", "\n### ") if (i := text.find(mark, start)) > 0]
    return text[start : min(ends, default=len(text))].strip() + "\n"


def commands() -> str:
    """What ``--help`` says of every command."""
    parser = cli.build_parser()
    lines = []
    for name in cli.EXAMPLES:
        (sub,) = (a.choices[name] for a in parser._actions if isinstance(a.choices, dict))
        said = sub.format_help().strip()
        lines += [f"## `dh {name}`", "", "```text", said, "```", ""]
    return "\n".join(lines)


def api_page(heading: str, modules: tuple[str, ...]) -> str:
    """A page of reStructuredText that has autodoc read some modules."""
    lines = [heading, "=" * len(heading), ""]
    for module in modules:
        lines += [module, "-" * len(module), "", f".. automodule:: {module}", ""]
    return "\n".join(lines)


def configuration() -> str:
    """The reference of every config, as Markdown."""
    lines = [
        "# Configuration",
        "",
        "Every YAML file and every `KEY=VALUE` of the command line is checked against the schemas",
        "below; an unknown key is an error that names the nearest known one. `dh configs show",
        "data=demo` prints a composed config, whole. This page is made from the schemas.",
        "",
    ]
    told: set[type] = set()
    lines += ["## Commands", ""]
    for command, kind in ROOTS.items():
        lines += [f"### `{command}`", "", *_described(kind, "", told)]
    shipped = list_configs()
    for group, kind in GROUPS.items():
        names = ", ".join(f"`{name}`" for name in shipped.get(group, []))
        lines += [f"## `{group}`", "", f"Shipped: {names}." if names else "", ""]
        lines += _described(kind, group, told)
        if group == "data":
            for name, source in schema.SOURCE_KINDS.items():
                lines += [f"### `data.sources.NAME`, `kind: {name}`", ""]
                lines += _described(source, "data.sources.NAME", told)
    return "\n".join(lines) + "\n"


def _described(kind: type, prefix: str, told: set[type]) -> list[str]:
    """A schema as a table, and the schemas inside it that no other table has told."""
    told.add(kind)
    lines = [inspect.getdoc(kind) or "", "", "| key | type | default | meaning |",
             "| --- | --- | --- | --- |"]  # fmt: skip
    fields = fields_of(kind)
    lines += [f"| `{f.name}` | {_code(f.kind)} | {_code(f.default)} | {_cell(f.meaning)} |"
              for f in fields]  # fmt: skip
    lines.append("")
    if prefix:  # the groups of a root have sections of their own
        for inner in inner_schemas(kind):
            if inner not in told and inner not in GROUPS.values():
                lines += [f"### `{inner.__name__}`", "", *_described(inner, prefix, told)]
    return lines


def inner_schemas(kind: type) -> list[type]:
    """The dataclasses that a schema's fields name, in their order."""
    homes = vars(inspect.getmodule(kind))
    found = []
    for field in dataclasses.fields(kind):
        words = str(field.type).replace("[", " ").replace("]", " ").replace("|", " ").split()
        for word in words:
            inner = homes.get(word.strip(","))
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                found.append(inner)
    return found


def fields_of(kind: type) -> list[Field]:
    """The keys of a schema with their comments, those it inherits included."""
    own = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            own |= _written(base)
    return [own[field.name] for field in dataclasses.fields(kind)]


def _written(kind: type) -> dict[str, Field]:
    source = inspect.getsource(kind)
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    found = {}
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        above, line = [], statement.lineno - 1
        while line in comments and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        beside = [comments[n] for n in range(statement.lineno, (statement.end_lineno or 0) + 1)
                  if n in comments]  # fmt: skip
        found[statement.target.id] = Field(
            statement.target.id,
            ast.unparse(statement.annotation),
            _default(statement.value),
            " ".join([*above, *beside]),
        )
    return found


def _default(value: ast.expr | None) -> str:
    """A default as one would write it in YAML."""
    if value is None:
        return "required"
    text = ast.unparse(value)
    if not text.startswith("field("):
        return {"None": "null", "True": "true", "False": "false"}.get(text, text.strip("'\""))
    for made, shown in (("=dict", "{}"), ("=list", "[]")):
        if f"default_factory{made}" in text:
            return shown
    return "as below"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else "`\"\"`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
