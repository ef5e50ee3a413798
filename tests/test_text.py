from __future__ import annotations

import builtins
import copy
import errno
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrnn import text as text_module
from fastrnn.text import LEVELS, Vocabulary, default_corpus, read_corpus

# A shared machine may stall any single example.
patient = settings(deadline=None)
SPECIALS = ("<unk>", "<eos>")
any_text = st.text(max_size=60)
# A str may hold lone surrogates; among all characters hypothesis would hardly draw one.
surrogates = st.sampled_from("\ud800\udbff\udc00\udfff")
odd_text = st.lists(st.characters() | surrogates, max_size=60).map("".join)
wordy_text = st.text(st.sampled_from("ab'’\u0301\u200c<>unkeos_9 \n\r\t.,é中न\u093f"), max_size=60)


# Round trips


@patient
@given(any_text)
def test_bytes_round_trip(text):
    vocabulary = Vocabulary.build("", "byte")
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode("utf-8"))
    assert vocabulary.decode(ids) == text


@patient
@given(st.binary(max_size=60))
def test_bytes_that_are_not_text_decode_with_replacement(data):
    vocabulary = Vocabulary("byte")
    ids = vocabulary.encode(data)
    assert ids.tolist() == list(data)
    assert vocabulary.decode(ids) == data.decode("utf-8", "replace")


@patient
@given(odd_text)
def test_characters_round_trip(text):
    vocabulary = Vocabulary.build(text, "char")
    assert vocabulary.tokens == (*SPECIALS, *sorted(set(text)))
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32
    assert ids.shape == (len(text),)
    assert ids.tolist() == [vocabulary.tokens.index(character) for character in text]
    assert vocabulary.decode(ids) == text


@patient
@given(odd_text, odd_text)
def test_unknown_characters_become_unk(corpus, text):
    vocabulary = Vocabulary.build(corpus, "char")
    ids = vocabulary.encode(text)
    assert [i == vocabulary.unk_id for i in ids] == [c not in corpus for c in text]
    assert vocabulary.decode(ids) == "".join(
        c if c in corpus else "\N{REPLACEMENT CHARACTER}" for c in text
    )


@patient
@given(wordy_text | any_text, wordy_text | any_text)
def test_words_survive_decoding_and_encoding_again(corpus, text):
    vocabulary = Vocabulary.build(corpus, "word")
    for source in (corpus, text):
        ids = vocabulary.encode(source)
        assert ids.dtype == np.int32
        assert vocabulary.encode(vocabulary.decode(ids)).tolist() == ids.tolist()


@patient
@given(any_text)
def test_words_lose_nothing_but_white_space(text):
    text = text.replace("<", "(")
    vocabulary = Vocabulary.build(text, "word")
    decoded = vocabulary.decode(vocabulary.encode(text))
    assert "".join(decoded.split()) == "".join(text.split())
    assert decoded.count("\n") == text.count("\n")


@patient
@given(st.data(), st.sampled_from(LEVELS))
def test_any_ids_decode(data, level):
    vocabulary = Vocabulary.build("some text, né\n𝄞", level)
    ids = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=20))
    decoded = vocabulary.decode(np.array(ids, np.int32))
    assert decoded == vocabulary.decode(ids)
    if level == "char":
        kept = [i for i in ids if i != vocabulary.eos_id]
        assert len(decoded) == len(kept)
        assert vocabulary.encode(decoded).tolist() == kept


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("corpus", ["", "abc"])
def test_the_empty_text(level, corpus):
    vocabulary = Vocabulary.build(corpus, level)
    ids = vocabulary.encode("")
    assert ids.dtype == np.int32
    assert ids.shape == (0,)
    assert vocabulary.decode(ids) == vocabulary.decode([]) == ""


def test_lone_surrogates_at_the_byte_level_encode_and_come_back_replaced():
    vocabulary = Vocabulary("byte")
    assert set(vocabulary.decode(vocabulary.encode("\ud800"))) == {"\N{REPLACEMENT CHARACTER}"}


@pytest.mark.parametrize("level", LEVELS)
def test_pieces_join_without_a_seam(level, monkeypatch):
    monkeypatch.setattr(text_module, "_PIECE", 7)
    text = "Né 𝄞 don't\nstop " * 20
    vocabulary = Vocabulary.build(text, level)
    ids = vocabulary.encode(text)
    monkeypatch.undo()
    assert vocabulary == Vocabulary.build(text, level)
    assert ids.tolist() == vocabulary.encode(text).tolist()
    assert len(ids) > 70


@pytest.mark.parametrize("level", LEVELS)
def test_encoding_needs_little_more_memory_than_its_result(level):
    text = "word " * (200_000 if level == "word" else 400_000)
    vocabulary = Vocabulary.build(text, level)
    tracemalloc.start()
    try:
        ids = vocabulary.encode(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    utf8 = len(text) if level == "byte" else 0
    growth = ids.nbytes if level == "word" else 0
    assert peak < ids.nbytes + utf8 + growth + 5_000_000


@pytest.mark.parametrize("level", LEVELS)
def test_encoded_ids_are_fresh_and_writable(level):
    vocabulary = Vocabulary.build("ab", level)
    first = vocabulary.encode("ab")
    first[:] = 1
    assert vocabulary.encode("ab").tolist() != first.tolist()


# What the levels mean


def test_byte_level():
    vocabulary = Vocabulary.build(b"anything", "byte")
    assert (len(vocabulary), vocabulary.level) == (257, "byte")
    assert (vocabulary.unk_id, vocabulary.eos_id) == (None, 256)
    assert vocabulary.tokens[0x41] == "<0x41>"
    assert vocabulary.tokens[256] == "<eos>"
    assert vocabulary.decode([0xC3, 0xA9, 256, 0xFF, 0x41]) == "é\N{REPLACEMENT CHARACTER}A"


def test_char_level():
    vocabulary = Vocabulary.build("b\na𝄞b", "char")
    assert vocabulary.tokens == (*SPECIALS, "\n", "a", "b", "𝄞")
    assert (len(vocabulary), vocabulary.level) == (6, "char")
    assert (vocabulary.unk_id, vocabulary.eos_id) == (0, 1)
    assert vocabulary.encode("<eos>𝄞\U0010ffff").tolist() == [0, 0, 0, 0, 0, 5, 0]
    assert vocabulary.decode([3, 1, 0, 2, 5]) == "a\N{REPLACEMENT CHARACTER}\n𝄞"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, world", ["Hello", ",", "world"]),
        ("don't ’tis rock'n'roll dogs'", ["don't", "’", "tis", "rock'n'roll", "dogs", "'"]),
        ("snake_case 3.14 a-b", ["snake_case", "3", ".", "14", "a", "-", "b"]),
        ("a\n\nb\r\n", ["a", "<eos>", "<eos>", "b", "<eos>"]),
        ("the <unk> of <eos> <unknown>", ["the", "<unk>", "of", "<eos>", "<", "unknown", ">"]),
        ("e\u0301te\u0301 हिन्दी می\u200cروم", ["e\u0301te\u0301", "हिन्दी", "می\u200cروم"]),
        ("\u0301a 🎉🎉", ["\u0301", "a", "🎉", "🎉"]),
        ("a\u00a0b\tc\x0bd\u2028e", ["a", "b", "c", "d", "e"]),
    ],
)
def test_word_split(text, words):
    vocabulary = Vocabulary.build(text, "word")
    assert [vocabulary.tokens[i] for i in vocabulary.encode(text)] == words
    assert len(vocabulary) == len({*words, *SPECIALS})


def test_word_level():
    vocabulary = Vocabulary.build("b a\nb c <unk> a, b", "word")
    assert vocabulary.tokens == (*SPECIALS, "b", "a", ",", "c")
    assert (len(vocabulary), vocabulary.level) == (6, "word")
    assert (vocabulary.unk_id, vocabulary.eos_id) == (0, 1)
    assert vocabulary.decode(vocabulary.encode("a,  b new\n\n b\n")) == "a , b <unk>\n\nb\n"
    assert vocabulary.decode([1, 2, 1]) == "\nb\n"


@patient
@given(wordy_text | any_text)
def test_words_come_by_frequency_then_by_code_points(text):
    vocabulary = Vocabulary.build(text, "word")
    ids = vocabulary.encode(text).tolist()
    order = [(-ids.count(i), vocabulary.tokens[i]) for i in range(2, len(vocabulary))]
    assert order == sorted(order)
    assert all(count < 0 for count, _ in order)


def test_max_size_and_min_count():
    text = "d d d c c b b a"
    assert Vocabulary.build(text, "word", max_size=4).tokens[2:] == ("d", "b")
    assert Vocabulary.build(text, "word", min_count=2).tokens[2:] == ("d", "b", "c")
    assert Vocabulary.build(text, "word", max_size=100, min_count=4).tokens == SPECIALS
    # Characters stay sorted whatever was dropped; the space is the most frequent here.
    assert Vocabulary.build(text, "char", max_size=5).tokens[2:] == (" ", "b", "d")
    assert Vocabulary.build(text, "char", min_count=3).tokens[2:] == (" ", "d")
    assert len(Vocabulary.build(text, "char", max_size=np.int64(3))) == 3


def test_builds_do_not_depend_on_the_hash_seed():
    program = (
        "from fastrnn.text import *; t = default_corpus()[:20000];"
        "print([Vocabulary.build(t, level).tokens for level in LEVELS])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


# The object


@pytest.mark.parametrize("level", LEVELS)
def test_copies_are_equal_and_hash_alike(level):
    vocabulary = Vocabulary.build("some text", level)
    for other in (
        copy.copy(vocabulary),
        copy.deepcopy(vocabulary),
        pickle.loads(pickle.dumps(vocabulary)),
        Vocabulary.from_config(json.loads(json.dumps(vocabulary.to_config()))),
    ):
        assert other == vocabulary
        assert hash(other) == hash(vocabulary)
        assert other.encode("some new text").tolist() == vocabulary.encode("some new text").tolist()
    assert vocabulary != "some text"


def test_different_vocabularies_differ():
    built = [Vocabulary.build(text, level) for level in ("char", "word") for text in ("a", "b")]
    assert len({*built, Vocabulary("byte")}) == 5


def test_a_vocabulary_is_immutable():
    vocabulary = Vocabulary.build("ab", "char")
    for name in ("level", "tokens", "unk_id", "_tokens", "new"):
        with pytest.raises(AttributeError):
            setattr(vocabulary, name, "x")
    with pytest.raises(AttributeError, match="immutable"):
        del vocabulary._tokens
    vocabulary.to_config()["tokens"].append("c")
    assert vocabulary.tokens == (*SPECIALS, "a", "b")
    assert repr(vocabulary) == "<Vocabulary of 4 char tokens>"


@patient
@given(odd_text, st.sampled_from(LEVELS))
def test_config_round_trip(text, level):
    vocabulary = Vocabulary.build(text, level)
    config = json.loads(json.dumps(vocabulary.to_config()))
    assert Vocabulary.from_config(config).tokens == vocabulary.tokens


class Endless(list):
    def __iter__(self):
        while True:
            yield "x"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "vocabulary: expected a dict, got NoneType"),
        ([], "vocabulary: expected a dict, got list"),
        ({}, "level: expected one of byte, char, word, got None"),
        ({"level": "line", "tokens": []}, "level: .*got 'line'"),
        ({"level": ["char"], "tokens": []}, r"level: .*got \['char'\]"),
        ({"level": "char"}, "tokens: expected a list of strings, got NoneType"),
        ({"level": "char", "tokens": "ab"}, "tokens: expected a list of strings, got str"),
        ({"level": "word", "tokens": {"a": 1}}, "tokens: expected a list of strings, got dict"),
        ({"level": "char", "tokens": [], "size": 3}, r"fields \['level', 'tokens'\].*got 'size'"),
        ({"level": "byte", "tokens": ["<eos>"]}, r"fields \['level'\] for level 'byte', got 'tok"),
        ({"level": "byte", 7: 1}, r"fields \['level'\] for level 'byte', got 7"),
        ({"level": "char", "tokens": []}, r"tokens: expected <unk> and <eos> in front, got \[\]"),
        ({"level": "char", "tokens": ["<unk>", "a"]}, "<eos> in front, got .*'a'"),
        ({"level": "word", "tokens": ["<eos>", "<unk>"]}, "tokens: expected <unk> and <eos>"),
        ({"level": "word", "tokens": [*SPECIALS, 5]}, r"tokens\[2\]: expected a string, got int"),
        ({"level": "char", "tokens": [*SPECIALS, "a", None]}, r"tokens\[3\]: .*got NoneType"),
        ({"level": "char", "tokens": [*SPECIALS, "ab"]}, r"tokens\[2\]: .*character, got 'ab'"),
        ({"level": "char", "tokens": [*SPECIALS, ""]}, r"tokens\[2\]: .*character, got ''"),
        ({"level": "word", "tokens": [*SPECIALS, ""]}, r"tokens\[2\]: expected a word.*got ''"),
        ({"level": "word", "tokens": [*SPECIALS, "a b"]}, r"tokens\[2\]: .*got 'a b'"),
        ({"level": "word", "tokens": [*SPECIALS, "\n"]}, r"tokens\[2\]: .*got '\\n'"),
        ({"level": "word", "tokens": [*SPECIALS, "a", "b", "a"]}, "each token once, got 'a' 2 t"),
        ({"level": "word", "tokens": [*SPECIALS, "<unk>"]}, "each token once, got '<unk>' 2"),
        (
            {"level": "word", "tokens": [*SPECIALS, "x" * 10**6 + " "]},
            r"got 'x{9,40}\.\.\.x{9,40} '$",
        ),
    ],
)
def test_hostile_configs(config, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.from_config(config)


def test_too_many_tokens(monkeypatch):
    monkeypatch.setattr(text_module, "_MAX_TOKENS", 4)
    assert len(Vocabulary("char", [*SPECIALS, "a", "b"])) == 4
    for tokens in ([*SPECIALS, "a", "b", "c"], Endless()):
        with pytest.raises(ValueError, match="tokens: expected at most 4 entries, got more"):
            Vocabulary("char", tokens)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@patient
@given(
    json_values
    | st.fixed_dictionaries(
        {"level": st.sampled_from(LEVELS)},
        optional={"tokens": st.lists(json_values, max_size=4).map(lambda t: [*SPECIALS, *t])},
    )
)
def test_any_json_is_a_vocabulary_or_a_value_error(config):
    try:
        vocabulary = Vocabulary.from_config(config)
    except ValueError:
        return
    assert vocabulary.to_config() == config


# Wrong arguments


@pytest.mark.parametrize("level", LEVELS)
def test_ids_out_of_range(level):
    vocabulary = Vocabulary.build("ab", level)
    size = len(vocabulary)
    for bad in (-1, size, 2**31, -(2**63), 2**64 - 1):
        expected = re.escape(f"ids: expected values in 0..{size - 1}, got {bad}")
        with pytest.raises(ValueError, match=expected + "$"):
            vocabulary.decode(np.array([bad, bad]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (3, r"shape \(T,\), got shape \(\)"),
        ([[1, 2]], r"shape \(T,\), got shape \(1, 2\)"),
        ([1.0], "integers, got dtype float64"),
        ([True], "integers, got dtype bool"),
        (["a"], "integers, got dtype <U1"),
        ([2**70], "integers, got dtype object"),
    ],
)
def test_ids_of_the_wrong_kind(ids, message):
    with pytest.raises(ValueError, match="ids: expected " + message):
        Vocabulary.build("ab", "char").decode(ids)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64, ">i4"])
def test_ids_of_every_integer_dtype(dtype):
    for level in LEVELS:
        vocabulary = Vocabulary.build("a b", level)
        ids = vocabulary.encode("a b").astype(dtype)
        assert vocabulary.decode(ids) == "a b"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("text", [None, 5, ["a"], b"bytes", bytearray(b"a")])
def test_text_of_the_wrong_type(level, text):
    vocabulary = Vocabulary.build("ab", level)
    if level == "byte" and isinstance(text, bytes):
        assert vocabulary.encode(text).tolist() == list(text)
        return
    wanted = f"text: expected str.* for level '{level}', got {type(text).__name__}"
    with pytest.raises(TypeError, match=wanted):
        vocabulary.encode(text)
    with pytest.raises(TypeError, match=wanted):
        Vocabulary.build(text, level)


@pytest.mark.parametrize(
    ("level", "options", "message"),
    [
        ("line", {}, "level: expected one of byte, char, word, got 'line'"),
        (None, {}, "level: expected one of byte, char, word, got None"),
        ("char", {"max_size": 2}, "max_size: expected an integer of at least 3, got 2"),
        ("word", {"max_size": -1}, "max_size: .* got -1"),
        ("word", {"max_size": 10.0}, "max_size: .* got 10.0"),
        ("word", {"max_size": True}, "max_size: .* got True"),
        ("char", {"min_count": 0}, "min_count: expected an integer of at least 1, got 0"),
        ("word", {"min_count": "2"}, "min_count: .* got '2'"),
        ("byte", {"max_size": 100}, "max_size and min_count: .*'byte'.* got max_size=100"),
        ("byte", {"min_count": 2}, "max_size and min_count: .* min_count=2"),
    ],
)
def test_build_refuses(level, options, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.build("some text", level, **options)


@pytest.mark.parametrize("tokens", [None, "<unk>", b"ab", 5])
def test_the_constructor_refuses_what_is_no_sequence_of_tokens(tokens):
    with pytest.raises(ValueError, match="tokens: expected a sequence of strings, got"):
        Vocabulary("word", tokens)


def test_the_constructor_takes_no_tokens_for_bytes():
    with pytest.raises(ValueError, match="tokens: expected none for level 'byte'"):
        Vocabulary("byte", ["a"])


# Corpora


@pytest.mark.parametrize("level", ["char", "word"])
def test_text_is_read_as_it_is(tmp_path, level):
    path = tmp_path / "corpus.txt"
    path.write_bytes("a\r\nb\rc\n\ufeffé𝄞".encode())
    assert read_corpus(path, level) == "a\r\nb\rc\n\ufeffé𝄞"
    assert read_corpus(str(path), level) == read_corpus(path, level)


def test_a_byte_order_mark_is_dropped_from_text_only(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert read_corpus(path, "char") == "abc"
    assert read_corpus(path, "byte") == b"\xef\xbb\xbfabc"


@given(data=st.binary(min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_bytes_are_read_as_they_are(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("corpus") / "corpus"
    path.write_bytes(data)
    assert read_corpus(path, "byte") == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected text, got an empty file"),
        (b"\xef\xbb\xbf", "expected text, got an empty file"),
        (b"abc\0def", "UTF-8 text for level 'char', got a NUL byte at byte 3.*--level byte"),
        (b"abc\xff", "UTF-8 text for level 'char', got 0xFF at byte 3 .*--level byte"),
        (b"\xef\xbb\xbfab\xc3", "got 0xC3 at byte 5 .*unexpected end.*--level byte"),
        (b"\xed\xa0\x80", "got 0xED at byte 0 .*--level byte"),
        ("text".encode("utf-16"), "level 'char', got .*--level byte"),
    ],
)
def test_files_that_are_not_text(tmp_path, data, message):
    path = tmp_path / "corpus.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(repr(str(path))) + ": .*" + message) as caught:
        read_corpus(path, "char")
    assert type(caught.value) is ValueError


def test_an_empty_file_has_no_bytes_either(tmp_path):
    path = tmp_path / "corpus"
    path.touch()
    with pytest.raises(ValueError, match=r"corpus.*at least one byte, got an empty file"):
        read_corpus(path, "byte")


@pytest.mark.parametrize("level", LEVELS)
def test_files_that_cannot_be_read(tmp_path, level, monkeypatch):
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=r"expected a readable file, got: .*missing"):
        read_corpus(missing, level)
    with pytest.raises(IsADirectoryError, match="expected a readable file, got: a directory") as e:
        read_corpus(tmp_path, level)
    assert e.value.filename == str(tmp_path)
    with pytest.raises(ValueError, match=r"expected the path of a file, got 'a\\x00b'"):
        read_corpus("a\0b", level)

    def refuse(name, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

    # Permission bits do not bind root, so the refusal itself is played.
    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(PermissionError, match=r"readable file, got: Permission denied: .*missing"):
        read_corpus(missing, level)


def test_read_corpus_refuses_an_unknown_level_before_reading(tmp_path):
    with pytest.raises(ValueError, match="level: expected one of byte, char, word, got 'line'"):
        read_corpus(tmp_path / "missing", "line")


def check_default_corpus(corpus):
    assert len(corpus) > 100_000
    assert "\0" not in corpus
    assert corpus.encode("utf-8").decode("utf-8") == corpus
    assert len(set(corpus)) < 1000
    assert corpus.count(" the ") > 500


def test_default_corpus():
    topics = pytest.importorskip("pydoc_data.topics").topics
    corpus = default_corpus()
    check_default_corpus(corpus)
    assert corpus == default_corpus()
    assert corpus.startswith(topics[min(topics)])
    assert corpus.endswith(topics[max(topics)])


def test_default_corpus_without_pydoc_data(monkeypatch):
    with_topics = default_corpus()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    corpus = default_corpus()
    check_default_corpus(corpus)
    assert corpus == default_corpus()
    assert corpus != with_topics


def test_default_corpus_without_any_source(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(text_module.importlib.util, "find_spec", lambda name: None)
    corpus = default_corpus()
    assert len(corpus) > 10_000
    assert str.__doc__ in corpus


def test_import_stays_light():
    # Loaded by its path, so that the package's other modules play no role.
    program = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('text', {text_module.__file__!r});"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec));"
        "heavy = {'numba', 'llvmlite', 'safetensors', 'tqdm', 'torch', 'pydoc_data.topics'};"
        "print(heavy & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True, timeout=60
    )
    assert run.stdout.strip() == "set()"
