"""`dh completion SHELL`: a script by which a shell completes commands, options and configs.

The script holds everything it offers, so completing starts no Python. It is made of the parser
and of the configs that ship; make it again after an update.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from dh_jax.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")


def completion_script(
    shell: str, parser: argparse.ArgumentParser, configs: Mapping[str, Sequence[str]]
) -> str:
    """The script for a shell.

    Args:
        shell: bash, zsh or fish.
        parser: of ``dh``.
        configs: group -> names that ship; offered as ``group=name``.

    Raises:
        ConfigError: there is no such shell.
    """
    if shell not in SHELLS:
        raise ConfigError(f"no completion for shell {shell!r}; known: {', '.join(SHELLS)}")
    commands = words(parser, configs)
    return _fish(commands) if shell == "fish" else _bash(commands, shell)


def words(
    parser: argparse.ArgumentParser, configs: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Command -> what may follow it: options, and overrides where it takes any."""
    (subparsers,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    overrides = [f"{group}={name}" for group, names in configs.items() for name in names]
    found = {}
    for name, sub in subparsers.choices.items():
        options = [o for action in sub._actions for o in action.option_strings if o[:2] == "--"]
        fixed = [
            str(choice)
            for action in sub._actions
            if not action.option_strings
            for choice in action.choices or ()
        ]
        takes = any(action.dest == "overrides" for action in sub._actions)
        found[name] = [*fixed, *sorted(options), *(overrides if takes else [])]
    return found


def _bash(commands: Mapping[str, Sequence[str]], shell: str) -> str:
    cases = "\n".join(
        f'    {name}) words="{" ".join(following)}" ;;' for name, following in commands.items()
    )
    zsh = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""# dh completion {shell}: put `source <(dh completion {shell})` into ~/.{shell}rc
{zsh}_dh() {{
  local words current="${{COMP_WORDS[COMP_CWORD]}}" previous
  # bash cuts words at "=": put `data=de` together again
  if [ "$current" = "=" ]; then previous="${{COMP_WORDS[COMP_CWORD-1]}}="; current=""
  elif [ "${{COMP_WORDS[COMP_CWORD-1]}}" = "=" ]; then previous="${{COMP_WORDS[COMP_CWORD-2]}}="
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
    *) words="" ;;
  esac
  if [ "$COMP_CWORD" -eq 1 ]; then words="{" ".join(commands)}"; fi
  COMPREPLY=($(compgen -W "$words" -- "$previous$current"))
  if [ -n "$previous" ]; then COMPREPLY=("${{COMPREPLY[@]#"$previous"}}"); fi
  if [ "${{COMPREPLY[0]-}}" != "${{COMPREPLY[0]%=*}}" ]; then compopt -o nospace 2>/dev/null; fi
}}
complete -o default -F _dh dh
"""


def _fish(commands: Mapping[str, Sequence[str]]) -> str:
    lines = [
        "# dh completion fish: dh completion fish > ~/.config/fish/completions/dh.fish",
        f"complete -c dh -n __fish_use_subcommand -xa '{' '.join(commands)}'",
    ]
    for name, following in commands.items():
        seen = f"'__fish_seen_subcommand_from {name}'"
        plain = " ".join(word for word in following if not word.startswith("--"))
        if plain:
            lines.append(f"complete -c dh -n {seen} -a '{plain}'")
        lines += [
            f"complete -c dh -n {seen} -l {word[2:]}" for word in following if word[:2] == "--"
        ]
    return "\n".join(lines) + "\n"
