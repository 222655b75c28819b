"""What is no tokenizer, or one that would lose text, is refused in one line with a remedy."""

import copy
import json
import re
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from pyllm.tokenizers import Tokenizer, train_bpe
from pyllm.tokenizers.lossless import SPLITS

TOKENIZER = train_bpe(["the cat and the hat and the rat"] * 3, 275)
CONTENT = json.loads(TOKENIZER._backend.to_str())
NEXT = TOKENIZER.vocab_size
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
BYTE_LEVEL["use_regex"] = True
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}


def changed(*keys, to):
    """The text of a tokenizer.json of which the value at a path of keys is another."""
    content = copy.deepcopy(CONTENT)
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return json.dumps(content)


def cut_by(pattern):
    """Words as many a published tokenizer.json cuts them."""
    cut = {**SPLIT, "behavior": "Isolated", "pattern": {"Regex": pattern}}
    return changed("pre_tokenizer", "pretokenizers", to=[cut, {**BYTE_LEVEL, "use_regex": False}])


def with_added(**fields):
    token = {**CONTENT["added_tokens"][-1], "id": NEXT, "content": "<|new|>", **fields}
    return changed("added_tokens", to=[*CONTENT["added_tokens"], token])


def vocab_with(**tokens):
    return changed("model", "vocab", to={**CONTENT["model"]["vocab"], **tokens})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "empty"),
        ("{", "not a tokenizer.json"),
        ('{"model": 1}', "not a tokenizer.json"),
        ('{"normalizer": ' + "[" * 100_000, "not a tokenizer.json .*recursion limit"),
        (json.dumps(CONTENT)[:-100], "not a tokenizer.json"),
        ("\ufeff" + json.dumps(CONTENT), "not a tokenizer.json"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (changed("model", "type", to="WordPiece"), "not a tokenizer.json"),
        (changed("model", "merges", to=[["a", "%%"]]), "not a tokenizer.json .*`%%` out of vocab"),
        (changed("model", "continuing_subword_prefix", to="##"), "prefix is '##'; expected null"),
        (changed("model", "end_of_word_suffix", to="</w>"), "end_of_word_suffix is '</w>'"),
        (changed("model", "dropout", to=0.5), "dropout is 0.5, with which texts are lost"),
        (changed("normalizer", to={"type": "Lowercase"}), "normalizer is .*Lowercase.* are lost"),
        (changed("truncation", to=TRUNCATION), "truncation is .* with which texts are lost"),
        (changed("truncation", to={**TRUNCATION, "stride": 5}), "stride|truncation"),
        (changed("pre_tokenizer", to=None), "pre_tokenizer ends with {}; expected ByteLevel"),
        (
            changed("pre_tokenizer", to={**BYTE_LEVEL, "add_prefix_space": True}),
            "pre_tokenizer ends with .* expected ByteLevel without add_prefix_space",
        ),
        (
            changed("pre_tokenizer", "pretokenizers", to=[SPLIT, BYTE_LEVEL]),
            "pre_tokenizer may drop text: .*Split",
        ),
        (
            changed(
                "pre_tokenizer",
                "pretokenizers",
                to=[{**SPLIT, "behavior": "Isolated"}, BYTE_LEVEL],
            ),
            "pre_tokenizer splits at {'String': ' '}; expected the pattern of pyllm, GPT-2",
        ),
        (
            changed("pre_tokenizer", "pretokenizers", to=[BYTE_LEVEL, BYTE_LEVEL]),
            "pre_tokenizer may drop text: .*ByteLevel",
        ),
        (changed("decoder", to=None), "decoder is None; expected ByteLevel"),
        (
            changed(
                "post_processor", to={"type": "BertProcessing", "sep": ["x", 1], "cls": ["y", 2]}
            ),
            "post_processor is 'BertProcessing'; expected ByteLevel or TemplateProcessing",
        ),
        (vocab_with(xy=9999), f"tokens leave the id {NEXT} out; expected 0 to {NEXT}"),
        (vocab_with(xy=20), "two of its tokens share the id 20"),
        (vocab_with(xy=-1), "not a tokenizer.json .*expected u32"),
        (vocab_with(xy=2**40), "not a tokenizer.json .*expected u32"),
        (
            changed(
                "model",
                "vocab",
                to={
                    {"é": "éé"}.get(key, key): id_ for key, id_ in CONTENT["model"]["vocab"].items()
                },
            ),
            "1 of the 256 bytes have no token, one is 'é'",
        ),
        (with_added(lstrip=True), "added token '<.new.>' swallows spaces"),
        (with_added(content="éé", special=False), "'éé' would be decoded as other bytes"),
        (with_added(content="the"), "special token 'the' is also what ordinary text is encoded as"),
        (with_added(content="a"), "special token 'a' is also what ordinary text is encoded as"),
        (
            changed("added_tokens", to=[*CONTENT["added_tokens"], CONTENT["added_tokens"][-1]]),
            "added token '.*' stands there twice",
        ),
        (changed("added_tokens", to=[]), r"no special token <\|endoftext\|>"),
        (
            changed("added_tokens", 0, "special", to=False),
            r"no special token <\|endoftext\|>, which marks the end",
        ),
        (
            changed("model", "ignore_merges", to=True),
            r"special token '<\|endoftext\|>' is also what ordinary text",
        ),
    ],
)
def test_a_file_that_is_refused(tmp_path, data, message):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(
        ValueError, match=rf"tokenizer\.json: .*({message}).*train_tokenizer\.py"
    ) as e:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "data",
    [
        with_added(),
        with_added(special=False),
        vocab_with(xy=NEXT),
        changed("pre_tokenizer", to=BYTE_LEVEL),
        *(cut_by(pattern) for pattern in SPLITS.values()),
        changed("post_processor", to=BYTE_LEVEL),
        changed("model", "continuing_subword_prefix", to=""),
    ],
    ids=["special", "added", "unused token", "byte level", *SPLITS, "offsets only", "no prefix"],
)
def test_a_file_that_is_let_in(tmp_path, data):
    file = tmp_path / "tokenizer.json"
    file.write_text(data)
    tokenizer = Tokenizer.load(file)
    text = " the  cat\n<|new|>xy <|pad|>é"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("token", ["<|new|>", "two words ☃", "\n"])
def test_an_added_token_is_its_own_bytes(tmp_path, token, special):
    (tmp_path / "tokenizer.json").write_text(with_added(content=token, special=special))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode(f"the{token}cat", allow_special=True)
    assert NEXT in ids
    assert tokenizer.decode_bytes(ids, skip_special=False) == f"the{token}cat".encode()
    assert tokenizer.decode_bytes(ids) == (b"thecat" if special else f"the{token}cat".encode())
    assert tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode()


def test_padding_in_the_file_does_not_pad_the_texts(tmp_path):
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<|pad|>"}
    (tmp_path / "tokenizer.json").write_text(changed("padding", to=padding))
    texts = ["a", "the cat"]
    assert Tokenizer.load(tmp_path).encode_batch(texts) == TOKENIZER.encode_batch(texts)


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: no tokenizer there; train one"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer\.json: a folder, where a tokenizer file"):
        Tokenizer.load(tmp_path)


PANICS = {
    "a split that backtracks without end": (
        cut_by("(?:a|a)*b|(a+)+$"),
        "splits at {'Regex': '(?:a|a)*b|(a+)+$'}; expected the pattern of pyllm, GPT-2, GPT-4",
    ),
    "a prefix longer than a token": (
        changed("model", "continuing_subword_prefix", to="##"),
        "continuing_subword_prefix is '##'; expected null",
    ),
}


@pytest.mark.parametrize("name", PANICS)
def test_nothing_of_a_panic_reaches_the_terminal(tmp_path, capfd, name):
    """The library writes some sixty lines, which redirect_stderr of Python does not catch."""
    data, message = PANICS[name]
    (tmp_path / "tokenizer.json").write_text(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        Tokenizer.load(tmp_path).encode("a" * 40 + "b")
    assert capfd.readouterr() == ("", "")


def test_too_many_spaces_in_a_row_do_not_reach_the_library(tmp_path, capfd):
    """At 10,000,000 the pattern of Llama 3 made it panic."""
    (tmp_path / "tokenizer.json").write_text(cut_by(SPLITS["GPT-4 and Llama 3"]))
    tokenizer = Tokenizer.load(tmp_path)
    text = " " * 10_000_001
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(ValueError, match="10,000,001 white-space characters in a row; expect"):
            encode(text)
    assert capfd.readouterr() == ("", "")


def test_only_patterns_that_turn_back_limit_the_spaces(tmp_path, monkeypatch):
    """Every byte string comes back with our own kinds of tokenizer, and with GPT-2's cuts."""
    monkeypatch.setattr("pyllm.tokenizers.tokenizer.MAX_SPACES", 5)
    text = f"a{' ' * 6}b"
    assert TOKENIZER.decode_bytes(TOKENIZER.encode_bytes(text.encode())) == text.encode()
    (tmp_path / "tokenizer.json").write_text(changed("pre_tokenizer", to=BYTE_LEVEL))
    assert Tokenizer.load(tmp_path).decode(TOKENIZER.encode(text)) == text
    (tmp_path / "tokenizer.json").write_text(cut_by(SPLITS["Qwen2"]))
    tokenizer = Tokenizer.load(tmp_path)
    for encode, given in ((tokenizer.encode, text), (tokenizer.encode_bytes, text.encode())):
        with pytest.raises(ValueError, match="6 white-space characters in a row; expected at most"):
            encode(given)
    assert len(tokenizer.encode("a\n" * 6)) == 12  # not in a row


def test_a_panic_that_is_not_known_is_a_value_error():
    """It is no Exception: no `except` of a script would stop it."""
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(CONTENT)))
    tokenizer._backend.pre_tokenizer = Split(Regex("(a+)+$"), behavior="isolated")
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(
            ValueError, match="library gave up .*retry-limit.*; the tokenizer is dam"
        ):
            encode("a" * 40 + "b")


BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
MERGES = "#version: 0.2\nh e\nt he\n"
VOCAB = {token: id_ for id_, token in enumerate([*BYTES, "he", "the", "<|endoftext|>"])}


@pytest.mark.parametrize(
    ("merges", "vocab", "message"),
    [
        (json.dumps(VOCAB), MERGES, r"merges: expected two tokens a line, found .*in this order"),
        ("h e\nt he x\n", json.dumps(VOCAB), "merges: expected two tokens a line, found 't he x'"),
        ("h e\n he\n", json.dumps(VOCAB), "merges: expected two tokens a line, found ' he'"),
        (MERGES[:-5], json.dumps(VOCAB), "merges: does not fit .*vocab, which alone .* 'the'"),
        (MERGES + "t h\n", json.dumps(VOCAB), "vocab: does not fit .*merges, which alone .* 'th'"),
        (
            MERGES,
            json.dumps({**VOCAB, "q": 5000}),
            "vocab: the id of 'q' is 5000; expected a whole",
        ),
        (MERGES, json.dumps({**VOCAB, "q": "1"}), "vocab: the id of 'q' is '1'; expected a whole"),
        (
            MERGES,
            json.dumps({**VOCAB, "q": True}),
            "vocab: the id of 'q' is True; expected a whole",
        ),
        (MERGES, json.dumps({**VOCAB, "q": 1}), "vocab: .* two of its tokens share the id 1"),
        (MERGES, "{", "vocab: not JSON"),
        (MERGES, '{"a": ' + "9" * 5000 + "}", "vocab: not JSON .*4300 digits"),
        (MERGES, "[" * 100_000, "vocab: not JSON .*recursion"),
        (MERGES, "[1, 2]", r"vocab: expected an object of ids, got \[1, 2\]"),
        (MERGES, b"\xff", "vocab: not UTF-8 at byte 0"),
        (" \n", json.dumps(VOCAB), "merges: empty, where a file of merges was expected"),
    ],
)
def test_gpt2_files_that_do_not_fit(tmp_path, merges, vocab, message):
    (tmp_path / "merges").write_text(merges)
    (tmp_path / "vocab").write_bytes(vocab if isinstance(vocab, bytes) else vocab.encode())
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_gpt2(tmp_path / "merges", tmp_path / "vocab")
    assert "\n" not in str(error.value)


def test_gpt2_files_that_fit(tmp_path):
    (tmp_path / "merges").write_text(MERGES)
    (tmp_path / "vocab").write_text(json.dumps(VOCAB))
    tokenizer = Tokenizer.from_gpt2(tmp_path / "merges", tmp_path / "vocab")
    assert tokenizer.encode("the") == [VOCAB["the"]]
    with pytest.raises(ValueError, match=r"none: no file of merges there; GPT-2's vocab\.bpe and"):
        Tokenizer.from_gpt2(tmp_path / "none", tmp_path / "vocab")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "special_tokens", "message"),
    [
        (["a"], 259, None, "vocab_size is 259; expected at least 260"),
        (["a"], True, None, "vocab_size must be a whole number from 1 to 1,048,576, got True"),
        (["a"], 300.0, None, "vocab_size must be .*, got 300.0"),
        (["a"], float("nan"), None, "vocab_size must be .*, got nan"),
        (["a"], "300", None, "vocab_size must be .*, got '300'"),
        (["a"], 2**32, None, "vocab_size must be .*, got 4294967296"),
        pytest.param(["a"], 10**5000, None, "vocab_size must be .*, got a value of", id="huge"),
        (["a"], 300, ("<|pad|>",), r"expected different tokens, none empty, <\|endoftext\|> first"),
        (["a"], 300, ("<|endoftext|>", ""), "expected different tokens, none empty"),
        (["a"], 300, "<|endoftext|>", "expected different tokens, none empty"),
        (["a"], 300, ("<|endoftext|>", 5), "a special token must be a str, not int"),
        (["a"], 300, ("<|endoftext|>", "\ud800"), "a special token has no UTF-8 form"),
        (["a"], 300, ("<|endoftext|>", "a"), "special token 'a' is also what ordinary text"),
        (["the the the"], 300, ("<|endoftext|>", "the"), "special token 'the' is also what"),
        (["", ""], 300, None, "every document is empty"),
        ([], 300, None, "every document is empty"),
        (["a", 5], 300, None, "text 1 must be a str, not int"),
        (["a", "b\ud800"], 300, None, "text 1 has no UTF-8 form: character 1 .* a lone surrogate"),
        (
            "a text",
            300,
            None,
            "must be a list or stream of str, got 'a text'; put one text in a list",
        ),
        (None, 300, None, "must be a list or stream of str, got None"),
    ],
)
@pytest.mark.parametrize("trainer", ["pyllm", "tokenizers"])
def test_training_on_nonsense(texts, vocab_size, special_tokens, message, trainer):
    more = {} if special_tokens is None else {"special_tokens": special_tokens}
    with pytest.raises(ValueError, match=message) as error:
        train_bpe(texts, vocab_size, trainer=trainer, **more)
    assert "\n" not in str(error.value)


def test_a_trainer_that_is_none():
    with pytest.raises(ValueError, match="trainer must be one of pyllm, tokenizers, got 'me'"):
        train_bpe(["a"], 300, trainer="me")


def test_numpy_integers_are_whole_numbers():
    assert train_bpe(["a"], np.int64(260)).vocab_size == 260
    assert TOKENIZER.decode(np.array(TOKENIZER.encode("the"), dtype=np.uint16)) == "the"
    assert TOKENIZER.decode(torch.tensor(TOKENIZER.encode("the"))) == "the"
    assert TOKENIZER.decode(iter(TOKENIZER.encode("the"))) == "the"
    assert TOKENIZER.decode([]) == ""


def test_a_failing_source_keeps_its_own_error():
    def texts():
        yield "a"
        raise RuntimeError("the source failed")

    for trainer in ("pyllm", "tokenizers"):
        with pytest.raises(RuntimeError, match="the source failed"):
            train_bpe(texts(), 300, trainer=trainer)


@pytest.mark.parametrize("allow_special", [False, True])
def test_texts_that_cannot_be_encoded(allow_special):
    with pytest.raises(ValueError, match="character 1 .* a lone surrogate"):
        TOKENIZER.encode("a\ud800", allow_special)
    with pytest.raises(ValueError, match="the text must be a str, not bytes"):
        TOKENIZER.encode(b"a", allow_special)


def test_batches_that_cannot_be_encoded():
    with pytest.raises(ValueError, match="text 1 must be a str, not bytes"):
        TOKENIZER.encode_batch(["a", b"a"])
    with pytest.raises(ValueError, match="must be a list or stream of str, got 'ab'"):
        TOKENIZER.encode_batch("ab")
    with pytest.raises(ValueError, match="the token must be a str, not int"):
        TOKENIZER.token_to_id(5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, NEXT], rf"token id {NEXT} is outside the vocabulary: expected 0 to {NEXT - 1}"),
        ([-1], "token id -1 is outside the vocabulary"),
        ([2**70], "token id 1180591620717411303424 is outside"),
        pytest.param([10**5000], "token id a value of type int is outside", id="huge"),
        ([1.9], r"token ids must be a list of whole numbers, got \[1.9\]"),
        (["12"], "token ids must be a list of whole numbers"),
        ("12", "token ids must be a list of whole numbers, got '12'"),
        (5, "token ids must be a list of whole numbers, got 5"),
        (None, "token ids must be a list of whole numbers, got None"),
        ([None], "token ids must be a list of whole numbers"),
        (torch.tensor([1.5]), "token ids must be a list of whole numbers, got tensor"),
        (torch.tensor(5), "token ids must be a list of whole numbers, got tensor"),
        (torch.tensor([[1], [2]]), "token ids must be a list of whole numbers"),
    ],
)
def test_ids_that_cannot_be_decoded(ids, message):
    with pytest.raises(ValueError, match=message) as error:
        TOKENIZER.decode(ids)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a" * 2_000_000, " " * 2_000_000, "ab" * 500_000])
@pytest.mark.parametrize("trainer", ["pyllm", "tokenizers"])
def test_a_text_that_is_one_word_is_trained_on_in_seconds(
    text: str, trainer: Literal["pyllm", "tokenizers"], watchdog: Callable[[], None]
) -> None:
    """Two million letters without a space once took the library over nine minutes."""
    watchdog()
    tokenizer = train_bpe([text, "once upon a time " * 50], 400, trainer=trainer)
    text = text[:500_000]
    assert tokenizer.decode(tokenizer.encode(text)) == text
