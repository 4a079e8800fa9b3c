"""`dh generate`: models by their names, prompts as text, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from rich.control import strip_control_codes

from dh_jax.cli import main
from dh_jax.completion import Written, complete, open_model
from dh_jax.config import ModelConfig, RunConfig
from dh_jax.console import print_written
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distributed.checkpoint import Checkpoints
from dh_jax.errors import ConfigError, StateError
from dh_jax.models.generation import generate
from dh_jax.models.pretrained import save_pretrained
from dh_jax.runconfig import save_config
from tests.dh_jax.models.model_cases import build

SHAPE = ModelConfig(
    width=16, layers=1, heads=2, kv_heads=1, mlp_width=16, tied=False, init_scale=0.3,
    max_positions=100,
)  # fmt: skip
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def folder(tokenizer: TokenizerWrapper, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    _, params = build(SHAPE, vocab_size=tokenizer.vocab_size)
    save_pretrained(folder, SHAPE, params, tokenizer)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_text_goes_in_and_the_likeliest_text_comes_out(
    folder: Path, tokenizer: TokenizerWrapper, capsys: Any
) -> None:
    graph, params = build(SHAPE, vocab_size=tokenizer.vocab_size)
    prompts = ["def total(", "[system] brief\n[user] Why?\n[assistant]"]
    ids = [tokenizer.encode(prompt)[:-1] for prompt in prompts]  # without EOS
    for prompt, row, options in (
        ("def total(", ids[0], []),
        ("Why?", ids[1], ["--chat", "--system", "brief"]),
    ):
        assert main(["generate", str(folder), prompt, *options, "--tokens", "8"]) == 0
        found = generate(graph, params, [row], 8, stop_ids=[tokenizer.eos_id or 0])
        shown = capsys.readouterr()
        length = int(found.lengths_B[0] - found.stopped_B[0])
        wanted = tokenizer.decode(found.tokens_BN[0, :length])
        assert shown.out == strip_control_codes(wanted) + "\n"  # a terminal obeys none
        assert f"{found.lengths_B[0]} tokens" in shown.err


@pytest.mark.slow
def test_a_runs_newest_checkpoint_writes(
    make_config: Any, tokenizer: TokenizerWrapper, tmp_path: Path, capsys: Any
) -> None:
    _, params = build(SHAPE, vocab_size=tokenizer.vocab_size)
    save_config(tmp_path, RunConfig(data=make_config(), model=SHAPE))
    with pytest.raises(StateError, match="the run has saved none yet"):
        open_model(tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, scale in ((1, 0.0), (2, 1.0)):
            moved = jax.tree.map(lambda x, scale=scale: x * scale, params)
            arrays = {"params": moved, "optimizer": [np.ones(3)], "key": np.zeros(2, np.uint32)}
            checkpoints.save(step, arrays, {})
        checkpoints.wait()
    opened = open_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, opened.params, params)
    arguments = ["a", "b", "--samples", "2", "--temperature", "1", "--tokens", "3", "--json"]
    assert main(["generate", str(tmp_path), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [x["prompt"] for x in found] == ["a", "a", "b", "b"]
    assert all(x["tokens"] == 3 or x["stop"] for x in found)
    assert len({x["text"] for x in found}) > 1
    other = dataclasses.replace(SHAPE, mlp_width=24)
    save_config(tmp_path, RunConfig(data=make_config(), model=other))
    with pytest.raises(StateError, match="does not fit this model"):
        open_model(tmp_path)


def test_mistakes_are_named_in_one_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    def refused(match: str, *arguments: str) -> None:
        assert main(["generate", *arguments]) == 2
        *before, line = capsys.readouterr().err.strip().splitlines()
        assert match in line and before in ([], ["reading the model"])

    refused("no model at", str(tmp_path / "nowhere"), "hi")
    refused("--samples is 0", str(folder), "hi", "--samples", "0")
    refused("add --chat", str(folder), "hi", "--system", "x")
    refused("a prompt of 130 tokens leaves no room", str(folder), "\x00" * 130)
    refused("prompt 0 has shape (0,)", str(folder), "")
    bare = tmp_path / "bare"
    save_pretrained(bare, SHAPE, build(SHAPE)[1])
    refused("has no tokenizer.json", str(bare), "hi")
    with pytest.raises(ConfigError, match="embedding 61 rows"):
        open_model(bare, tokenizer=str(folder))
    (folder / "chat_template.jinja").unlink()
    refused("no chat template", str(folder), "hi", "--chat")


def test_a_models_positions_bound_what_is_written(folder: Path) -> None:
    opened = open_model(folder)._replace(stop_ids=())
    *_, last = complete(opened, "\x00" * 97, new_tokens=50, every=50)
    assert (last.tokens, last.room, last.stops) == ([3], 3, [None])


def test_a_terminal_shows_the_prompt_and_text_as_it_grows() -> None:
    def grown(*texts: str) -> list[Written]:
        return [Written([text], [i + 1], [None], 3) for i, text in enumerate(texts)]

    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=20)
    parts = grown("[red]one", "[red]one two", "[red]one two three, a line beyond the width")
    print_written(["begin: "], iter(parts), chat=False, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "begin: [red]one two three, a line beyond the width\n" in shown
