"""Turn text into tokens with the `tokenizers` package; choose the tokens that begin and end text.

A tokenizer has *control tokens*: those that its file marks as special, and the two that begin and
end a document. Text that spells one, such as "</s>" in a page about HTML, is encoded as ordinary
text. If a tokenizer cannot do so (its model has the whole word), the text is cut after the word's
first character and the parts are encoded one by one.

The token that ends a document is the `eos_token` of tokenizer_config.json, with one exception: for
chat models, that is the token that ends a turn. If it is in the chat template, and the vocabulary
has a token of `END_OF_TEXT`, the latter is used.
"""

import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Integer

from hcp_jax.base.terminal import printable as shown
from hcp_jax.train.sections import SpecialTokens

END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "</s>",
    "[EOS]",
)
"""Usual names of the token that ends a text that is not a chat, the likeliest first."""

_TEXT_AT_ONCE = 2**22
"""Bytes of text that all cores encode together."""


class Tokenizer:
    """A tokenizer.json, and the tokens that begin and end a document.

    Args:
        path: the tokenizer.json.
        bos: the token that begins a document; None: as the tokenizer_config.json beside it says,
            and if it says nothing, the same as `eos`.
        eos: the token that ends a document; None: as the tokenizer_config.json says.
        special_tokens: how text that spells a control token is encoded: as "text", or as the
            "control" token.

    Attributes:
        vocab_size: all ids are below this.
        bos: the token before the first one of every document.
        eos: the token after the last one of every document.
        bos_id: the id of `bos`.
        eos_id: the id of `eos`.
        special_tokens: as given.
        sha256: checksum of the file, in hexadecimal.

    Raises:
        ValueError: if the file does not exist or is not a tokenizer, if no token is known to end a
            document, or if the tokenizer does not have the given token.
    """

    def __init__(
        self,
        path: pathlib.Path,
        bos: str | None = None,
        eos: str | None = None,
        special_tokens: SpecialTokens = "text",
    ):
        if not path.is_file():
            raise ValueError(f"tokenizer: {shown(path)} does not exist; give a tokenizer.json.")
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # The package raises no narrower type.
            raise ValueError(
                f"tokenizer: {shown(path)} is not a tokenizer.json ({error})."
            ) from None
        # A file may have truncation and padding switched on; they are for inference.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special_tokens, self.sha256 = special_tokens, hashlib.sha256(content).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"tokenizer: {shown(path)} has no tokens.")
        # Ids may have gaps, so the number of tokens may be too small.
        self.vocab_size = 1 + max(vocabulary.values())
        self._choose_ends(path, vocabulary, bos, eos)
        self._control = self._control_tokens(json.loads(content), {bos, eos})
        self._tokenizer.encode_special_tokens = special_tokens == "text"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest dtype that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def describe(self) -> list[str]:
        """Return lines that say which tokens begin and end a document, and how text is encoded."""
        ordinary = {self.bos_id: self.bos, self.eos_id: self.eos}.items() - self._control.items()
        words = (f"{shown(x)!r} is an ordinary word, which texts may have" for _, x in ordinary)
        lines = [f"tokenizer: {self._ends}", describe_special(self.special_tokens)]
        return [*lines, *sorted(words)]

    def __call__(self, texts: Iterable[bytes]) -> Iterator[Integer[np.ndarray, "n"]]:
        """Yield the tokens of each text, in order; see `batches`."""
        for _, encoded in self.batches(texts):
            yield from encoded

    def batches(
        self, texts: Iterable[bytes]
    ) -> Iterator[tuple[list[bytes], list[Integer[np.ndarray, "n"]]]]:
        """Yield texts and their tokens, a few megabytes (or one longer text) at a time.

        Raises:
            ValueError: if a text spells a control token and cannot be encoded otherwise.
        """
        for batch in _batches(texts):
            decoded = [text.decode() for text in batch]
            found = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
            ids = [np.asarray(encoded.ids, self.dtype) for encoded in found]
            if self.special_tokens == "text":
                control = list(self._control)
                for i in range(len(ids)):
                    if np.isin(ids[i], control).any():
                        ids[i] = self._as_text(decoded[i])
            yield batch, ids

    def _as_text(self, text: str) -> Integer[np.ndarray, "n"]:
        """Encode a text without control tokens, by cutting it inside the words that spell them."""
        whole = self._tokenizer.encode(text, add_special_tokens=False)
        spans = zip(whole.ids, whole.offsets, strict=True)
        cuts = [begin + 1 for i, (begin, end) in spans if i in self._control and end - begin > 1]
        borders = [0, *cuts, len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(borders)]
        encoded = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        ids = [i for part in encoded for i in part.ids]
        for i in ids:
            if i in self._control:
                raise ValueError(
                    f"tokenizer: there is a text that it cannot encode without the control token "
                    f"{shown(self._control[i])!r}: {text[:60]!r}. To encode such text as control "
                    "tokens, give --special-tokens control (data.special_tokens)."
                )
        return np.asarray(ids, self.dtype)

    def _control_tokens(self, saved: dict[str, Any], named: set[str | None]) -> dict[int, str]:
        """Return the ids and names of the tokens that ordinary text must not be encoded as.

        Args:
            saved: the content of the tokenizer.json.
            named: tokens that the user chose; they may be ordinary words, which occur in texts.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        control = {i: token.content for i, token in added.items() if token.special}
        # Text may become the token of unknown words, though most files mark it as special.
        model = saved.get("model", {})
        unknown = model.get("unk_token")
        control = {i: name for i, name in control.items() if name != unknown}
        if isinstance(model.get("unk_id"), int):
            control.pop(model["unk_id"], None)
        ends = {self.bos_id: self.bos, self.eos_id: self.eos}
        return control | {i: x for i, x in ends.items() if i in added or x not in named}

    def _choose_ends(
        self, path: pathlib.Path, vocabulary: dict[str, int], bos: str | None, eos: str | None
    ) -> None:
        beside = _read_config(path.with_name("tokenizer_config.json"))
        bos_from = eos_from = "as asked for"
        if eos is None:
            eos, eos_from = _token(beside, "eos_token", path), "by tokenizer_config.json"
            meant = _end_of_text(eos, beside, path, vocabulary)
            if meant is not None:
                eos_from = (
                    f"instead of {shown(eos)!r}, with which the chat template ends a turn; --eos "
                    "chooses another"
                )
                eos = meant
        if eos is None:
            raise ValueError(
                f"tokenizer: nothing says which token of {shown(path)} ends a text: there is no "
                "tokenizer_config.json beside it with an eos_token. Run hcp tokenize with --eos."
            )
        if bos is None:
            bos, bos_from = _token(beside, "bos_token", path), "by tokenizer_config.json"
        if bos is None:
            bos, bos_from = eos, "as nothing names another"
        self.bos, self.eos = bos, eos
        self.bos_id, self.eos_id = (_token_id(token, vocabulary, path) for token in (bos, eos))
        self._ends = (
            f"a document begins with {shown(bos)!r} ({self.bos_id}, {bos_from}) and ends with "
            f"{shown(eos)!r} ({self.eos_id}, {eos_from})"
        )


def describe_special(special_tokens: str) -> str:
    """Return a line that says how text that spells a control token is encoded."""
    if special_tokens == "text":
        return (
            'text that spells a special token, such as "</s>", is encoded as text '
            "(special_tokens: text)"
        )
    return (
        'text that spells a special token, such as "</s>", becomes that token '
        "(special_tokens: control)"
    )


def _batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _TEXT_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_config(file: pathlib.Path) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json; empty if there is none."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer: {shown(file)} is not JSON ({error}).") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"tokenizer: {shown(file)} must hold keys and values, got {type(values).__name__}."
        )
    return values


def _token(config: dict[str, Any], name: str, path: pathlib.Path) -> str | None:
    value = config.get(name)
    # Older files hold a token as a dict, together with how it is stripped.
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"tokenizer: {name} in the tokenizer_config.json beside {shown(path)} must be a token, "
            f"got {value!r}."
        )
    return value or None


def _end_of_text(
    eos: str | None, config: dict[str, Any], path: pathlib.Path, vocabulary: dict[str, int]
) -> str | None:
    """Return the token that ends a text if `eos` only ends a turn of a chat; else None."""
    if eos is None or eos in END_OF_TEXT:
        return None
    beside = path.with_name("chat_template.jinja")
    template = json.dumps(config.get("chat_template") or "", ensure_ascii=False)
    if beside.is_file():
        template += beside.read_bytes().decode(errors="replace")
    if eos not in template and "eos_token" not in template:
        return None
    return next((token for token in END_OF_TEXT if token in vocabulary), None)


def _token_id(token: str, vocabulary: dict[str, int], path: pathlib.Path) -> int:
    if token not in vocabulary:
        raise ValueError(
            f"tokenizer: {shown(path)} has no token {token!r}, which is to begin or end a text."
        )
    return vocabulary[token]
