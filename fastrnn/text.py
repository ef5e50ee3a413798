"""Vocabularies and corpora: text or bytes to int32 token ids and back.

>>> vocabulary = Vocabulary.build("hello", "char")
>>> vocabulary.encode("hole").tolist()
[3, 5, 4, 2]
>>> vocabulary.decode([3, 2, 4, 4, 5])
'hello'
"""

from __future__ import annotations

import builtins
import codecs
import errno
import functools
import importlib.util
import itertools
import os
import re
import reprlib
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NoReturn, final

import numpy as np
import numpy.typing as npt

__all__ = ["LEVELS", "Vocabulary", "default_corpus", "read_corpus"]

LEVELS = ("byte", "char", "word")

_UNK = "<unk>"
_EOS = "<eos>"
_SPECIALS = (_UNK, _EOS)
_BYTE_TOKENS = (*(f"<0x{byte:02X}>" for byte in range(256)), _EOS)
_MAX_TOKENS = 1 << 24
# Characters worked on at a time: 1 MiB of UTF-32, which stays in a core's cache.
_PIECE = 1 << 18


@final
class Vocabulary:
    """An immutable one-to-one map between tokens and the ids 0 .. len(vocabulary) - 1.

    `level` fixes what a token is:

    - `"byte"`: the 256 bytes of UTF-8 text or of any file, ids 0-255, then `<eos>` (256). Nothing
      is unknown, so `unk_id` is None.
    - `"char"`: `<unk>` (0), `<eos>` (1), then Unicode characters; a newline is a character.
    - `"word"`: `<unk>` (0), `<eos>` (1), then words and punctuation, most frequent first. A word
      is a run of letters, digits, underscores and combining marks, with apostrophes inside
      (`don't`); every other visible character is a token of its own; a newline is `<eos>`; other
      white space only separates. Case is kept. `<unk>` and `<eos>` written out in the text are
      those tokens, so that prepared corpora such as the Penn Treebank keep their meaning.

    `Vocabulary.build` makes one from a text and `Vocabulary.from_config` from a checkpoint.
    `Vocabulary(level, tokens)` takes the tokens themselves, in the order of their ids and with the
    specials in front; the byte level takes none.

    Raises:
        ValueError: unknown level, or tokens that are not what the level asks for.
    """

    __slots__ = ("_code_of_id", "_id_of_code", "_id_of_word", "_level", "_tokens")

    _level: str
    _tokens: tuple[str, ...]
    _code_of_id: np.ndarray
    _id_of_code: np.ndarray
    _id_of_word: dict[str, int]

    def __init__(self, level: str, tokens: Iterable[str] | None = None) -> None:
        _check_level(level)
        if level == "byte":
            if tokens is not None:
                raise ValueError("tokens: expected none for level 'byte', which fixes its own")
            checked = _BYTE_TOKENS
        else:
            checked = _check_tokens(level, tokens)
        freeze = functools.partial(object.__setattr__, self)
        freeze("_level", level)
        freeze("_tokens", checked)
        if level == "char":
            codes = np.array([0xFFFD, 0, *map(ord, checked[2:])], np.uint32)
            # One entry past the largest code point answers for everything beyond it.
            ids = np.zeros(int(codes[2:].max(initial=0)) + 2, np.int32)
            ids[codes[2:]] = np.arange(2, len(codes))
            freeze("_code_of_id", codes)
            freeze("_id_of_code", ids)
        elif level == "word":
            ids_of_words = {token: index for index, token in enumerate(checked)}
            ids_of_words["\n"] = ids_of_words[_EOS]
            freeze("_id_of_word", ids_of_words)

    @classmethod
    def build(
        cls, text: str | bytes, level: str, *, max_size: int | None = None, min_count: int = 1
    ) -> Vocabulary:
        """The vocabulary of a text; the same text always gives the same ids.

        Characters are sorted by code point, words by falling frequency and then by code points.

        Args:
            text: the corpus; str, or for level "byte" also bytes (there its content plays no role).
            level: "byte", "char" or "word".
            max_size: the most entries to keep, `<unk>` and `<eos>` included; the rarest go first,
                and among equals the later code points. At least 3. Default: no bound.
            min_count: how often a token must occur to be kept. Default 1.

        Raises:
            ValueError: unknown level, a bound out of range, or a bound for level "byte".
            TypeError: text of a type that the level does not take.
        """
        _check_level(level)
        _check_text(text, level)
        _check_int("min_count", min_count, 1)
        if max_size is not None:
            _check_int("max_size", max_size, 3)
        if level == "byte":
            if max_size is not None or min_count != 1:
                raise ValueError(
                    "max_size and min_count: expected their defaults for level 'byte', which"
                    f" always has {len(_BYTE_TOKENS)} entries; got max_size={max_size},"
                    f" min_count={min_count}"
                )
            return cls(level)
        assert isinstance(text, str)
        if level == "char":
            counts = _count_characters(text)
        else:
            counts = Counter(_words(text))
            for special in ("\n", *_SPECIALS):
                counts.pop(special, None)
        kept = [token for token, count in counts.items() if count >= min_count]
        kept.sort(key=lambda token: (-counts[token], token))
        if max_size is not None:
            del kept[max_size - len(_SPECIALS) :]
        if level == "char":
            kept.sort()
        return cls(level, (*_SPECIALS, *kept))

    @classmethod
    def from_config(cls, config: dict) -> Vocabulary:
        """The vocabulary that `to_config` described; trusts nothing about its argument.

        Raises:
            ValueError: anything that `to_config` could not have written, naming the field.
        """
        if type(config) is not dict:
            raise ValueError(f"vocabulary: expected a dict, got {_name_type(config)}")
        level = _check_level(config.get("level"))
        expected = {"level"} if level == "byte" else {"level", "tokens"}
        for field in config:
            if field not in expected:
                raise ValueError(
                    f"vocabulary: expected the fields {sorted(expected)} for level {level!r}, got"
                    f" {reprlib.repr(field)}"
                )
        tokens = config.get("tokens")
        if level != "byte" and type(tokens) is not list:
            raise ValueError(f"tokens: expected a list of strings, got {_name_type(tokens)}")
        return cls(level, tokens)

    def to_config(self) -> dict:
        """A JSON-able description, `{"level": str, "tokens": list[str]}`; bytes need no tokens."""
        if self._level == "byte":
            return {"level": self._level}
        return {"level": self._level, "tokens": list(self._tokens)}

    @property
    def level(self) -> str:
        """What a token is: "byte", "char" or "word"."""
        return self._level

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token of every id; bytes are written `<0x00>` .. `<0xFF>`."""
        return self._tokens

    @property
    def unk_id(self) -> int | None:
        """The id of `<unk>`, which stands for every unknown token; None for level "byte"."""
        return None if self._level == "byte" else 0

    @property
    def eos_id(self) -> int:
        """The id of `<eos>`; only the word level ever encodes text to it."""
        return 256 if self._level == "byte" else 1

    def encode(self, text: str | bytes) -> npt.NDArray[np.int32]:
        """The ids of a text, shape (T,), a fresh array; unknown tokens become `unk_id`.

        Works in pieces: memory is that of the result plus a few MiB (level "word": up to as much
        again while the result grows; level "byte" with str: plus its UTF-8 form).

        Raises:
            TypeError: not str (level "byte": neither str nor bytes).
        """
        _check_text(text, self._level)
        if self._level == "byte":
            data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
            return np.frombuffer(data, np.uint8).astype(np.int32)
        assert isinstance(text, str)
        if self._level == "char":
            ids = np.empty(len(text), np.int32)
            start = 0
            for codes in _code_points(text):
                stop = start + len(codes)
                np.take(self._id_of_code, codes, out=ids[start:stop], mode="clip")
                start = stop
            return ids
        found = map(self._id_of_word.get, _words(text), itertools.repeat(self.unk_id))
        return np.fromiter(found, np.int32)

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of a sequence of ids, shape (T,).

        Bytes and characters are joined as they are, without `<eos>`; bytes that are not UTF-8 and
        the unknown character become U+FFFD. Words are joined by single spaces, `<eos>` is a
        newline and the unknown word is `<unk>`.

        Raises:
            ValueError: ids that are not one-dimensional, not integers or out of range.
        """
        array = np.asarray(ids)
        if array.ndim != 1:
            raise ValueError(f"ids: expected shape (T,), got shape {array.shape}")
        if array.size == 0:
            return ""
        if array.dtype.kind not in "iu":
            raise ValueError(f"ids: expected integers, got dtype {array.dtype}")
        last = len(self._tokens) - 1
        for extreme in (int(array.min()), int(array.max())):
            if not 0 <= extreme <= last:
                raise ValueError(f"ids: expected values in 0..{last}, got {extreme}")
        if self._level == "word":
            words = ("\n" if i == self.eos_id else self._tokens[i] for i in array.tolist())
            return " ".join(words).replace(" \n", "\n").replace("\n ", "\n")
        array = array[array != self.eos_id]
        if self._level == "byte":
            return array.astype(np.uint8).tobytes().decode("utf-8", "replace")
        codes = self._code_of_id[array].astype("<u4", copy=False)
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def __len__(self) -> int:
        return len(self._tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self._level == other._level and self._tokens == other._tokens

    def __hash__(self) -> int:
        return hash((self._level, self._tokens))

    def __repr__(self) -> str:
        return f"<Vocabulary of {len(self)} {self._level} tokens>"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"Vocabulary is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"Vocabulary is immutable: cannot delete {name!r}")

    def __reduce__(self) -> tuple:
        # The default restores slots by setattr, which an immutable object refuses.
        return Vocabulary, (self._level, None if self._level == "byte" else self._tokens)


def read_corpus(path: str | os.PathLike[str], level: str) -> str | bytes:
    """The content of a file: bytes for level "byte", else its UTF-8 text.

    A leading byte order mark is dropped from text; line ends stay as they are.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError, OSError: it cannot be read.
        ValueError: unknown level, an empty file, or for text a NUL byte or a byte that is not
            UTF-8.
    """
    _check_level(level)
    name = os.fsdecode(path)
    try:
        # Asked first because Windows reports a directory as a matter of permissions.
        if os.path.isdir(name):
            raise IsADirectoryError(errno.EISDIR, "a directory")
        with open(name, "rb") as file:
            data = file.read()
    except OSError as error:
        what = f"corpus: expected a readable file, got: {error.strerror or error}"
        raise OSError(error.errno, what, name) from error
    except ValueError as error:
        raise ValueError(f"corpus: expected the path of a file, got {name!r}: {error}") from error
    if level == "byte":
        if not data:
            raise ValueError(f"corpus {name!r}: expected at least one byte, got an empty file")
        return data
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(
            f"corpus {name!r}: expected UTF-8 text for level {level!r}, got a NUL byte at byte"
            f" {nul}, as in binary files; --level byte takes any file"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"corpus {name!r}: expected UTF-8 text for level {level!r}, got 0x"
            f"{data[error.start]:02X} at byte {error.start} ({error.reason}); --level byte takes"
            " any file"
        ) from error
    text = text.removeprefix(codecs.BOM_UTF8.decode("utf-8"))
    if not text:
        raise ValueError(f"corpus {name!r}: expected text, got an empty file")
    return text


def default_corpus() -> str:
    """English text that comes with Python: the language reference behind `help()`, about 0.5 MB.

    Where `pydoc_data` was left out, the docstrings of the builtins and the sources of some
    standard modules take its place. The same interpreter always gives the same text; another
    version gives another one.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return _fallback_corpus()
    return "\n".join(topics[key] for key in sorted(topics))


def _fallback_corpus() -> str:
    names = sorted(name for name in vars(builtins) if not name.startswith("_"))
    parts = [getattr(builtins, name).__doc__ or "" for name in names]
    for module in ("argparse", "difflib", "doctest", "inspect", "statistics", "textwrap", "typing"):
        spec = importlib.util.find_spec(module)
        read_source = getattr(spec and spec.loader, "get_source", None)
        if read_source is None:
            continue
        try:
            parts.append(read_source(module) or "")
        except (ImportError, OSError):
            continue
    return "\n".join(parts)


def _code_points(text: str) -> Iterator[np.ndarray]:
    for start in range(0, len(text), _PIECE):
        # Lone surrogates are legal in str, and a vocabulary may hold them.
        data = text[start : start + _PIECE].encode("utf-32-le", "surrogatepass")
        yield np.frombuffer(data, "<u4")


def _count_characters(text: str) -> Counter[str]:
    counts = np.zeros(sys.maxunicode + 1, np.int64)
    for codes in _code_points(text):
        found = np.bincount(codes)
        counts[: len(found)] += found
    return Counter({chr(code): int(counts[code]) for code in np.flatnonzero(counts)})


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """What a word-level token is. Built on first use: finding the marks takes some 20 ms."""
    # Joiners belong to words in Persian and Indic scripts; marks are no part of \w in Python.
    marks = "\u200c\u200d" + "".join(
        chr(code)
        for code in itertools.chain(range(0x300, 0x20000), range(0xE0100, 0xE01F0))
        if unicodedata.category(chr(code))[0] == "M"
    )
    # The cheap lookahead spares ASCII text the large set: four times faster.
    word = rf"\w+(?:(?=['\u0300-\U0010FFFF])(?:['’]\w+|[{marks}]\w*))*"
    return re.compile(rf"{word}|\n|{_UNK}|{_EOS}|[^\w\s]")


def _words(text: str) -> Iterator[str]:
    return map(re.Match.group, _word_pattern().finditer(text))


def _check_level(level: object) -> str:
    if not (isinstance(level, str) and level in LEVELS):
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {reprlib.repr(level)}")
    return level


def _check_text(text: object, level: str) -> None:
    if isinstance(text, str) or (level == "byte" and isinstance(text, bytes)):
        return
    wanted = "str or bytes" if level == "byte" else "str"
    raise TypeError(f"text: expected {wanted} for level {level!r}, got {_name_type(text)}")


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(
            f"{name}: expected an integer of at least {least}, got {reprlib.repr(value)}"
        )


def _check_tokens(level: str, tokens: Iterable[str] | None) -> tuple[str, ...]:
    if tokens is None or isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        raise ValueError(f"tokens: expected a sequence of strings, got {_name_type(tokens)}")
    checked = tuple(itertools.islice(tokens, _MAX_TOKENS + 1))
    if len(checked) > _MAX_TOKENS:
        raise ValueError(f"tokens: expected at most {_MAX_TOKENS} entries, got more")
    if checked[:2] != _SPECIALS:
        raise ValueError(
            f"tokens: expected {_UNK} and {_EOS} in front, got {reprlib.repr(list(checked[:2]))}"
        )
    for index, token in enumerate(checked[2:], 2):
        if type(token) is not str:
            raise ValueError(f"tokens[{index}]: expected a string, got {_name_type(token)}")
        if level == "char" and len(token) != 1:
            raise ValueError(f"tokens[{index}]: expected one character, got {reprlib.repr(token)}")
        if level == "word" and token.split() != [token]:
            raise ValueError(
                f"tokens[{index}]: expected a word without white space, got {reprlib.repr(token)}"
            )
    if len(set(checked)) != len(checked):
        token, count = Counter(checked).most_common(1)[0]
        raise ValueError(
            f"tokens: expected each token once, got {reprlib.repr(token)} {count} times"
        )
    return checked


def _name_type(value: object) -> str:
    return type(value).__name__
