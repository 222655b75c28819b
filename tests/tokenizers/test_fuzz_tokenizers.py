"""Generated texts, ids and tokenizer files: what is let in gives every text back."""

import copy
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllm.data import write_stories
from pyllm.tokenizers import SPECIAL_TOKENS, Tokenizer, train_bpe
from pyllm.tokenizers.lossless import SPLITS

from .conftest import merge_by_hand

pytestmark = pytest.mark.fuzz

TOKENIZER = train_bpe([*write_stories(100, 0), "\u00e9\u4f60\u597d " * 20], 400)
SMALL = train_bpe(["the cat and the hat and the rat"] * 3, 275)
FILE = SMALL._backend.to_str()

TEXTS = st.text(st.characters(codec="utf-8"))
# Words the tokenizer knows, spaces, special tokens and their pieces: where the mistakes are.
WORDS = st.sampled_from(
    [
        *SPECIAL_TOKENS,
        "<|",
        "|>",
        "endoftext",
        "Once upon",
        " the",
        " ",
        "\n",
        "  ",
        "\t",
        "9",
        "'s",
    ]
)
MIXED = st.lists(WORDS | st.text(max_size=3), max_size=12).map("".join)


def bytes_of_characters():
    """GPT-2's table: printable bytes stand for themselves, the others for 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


TABLE = bytes_of_characters()
CHARACTERS = {byte: character for character, byte in TABLE.items()}


def slow_encode(text, vocab, merges, words):
    """The words that the library cuts, merged by hand: always the first pair of the list."""
    assert "".join(words) == "".join(CHARACTERS[byte] for byte in text.encode())
    return [vocab[token] for token in merge_by_hand(merges, words)]


def words_of(tokenizer, text):
    return [word for word, _ in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)]


def check_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_bytes(text.encode()) == ids
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


CONTENT = json.loads(TOKENIZER._backend.to_str())


@given(TEXTS | MIXED)
def test_every_text_comes_back_and_is_merged_as_the_list_says(watchdog, text):
    watchdog()
    check_lossless(TOKENIZER, text)
    model = CONTENT["model"]
    expected = slow_encode(text, model["vocab"], model["merges"], words_of(TOKENIZER, text))
    assert TOKENIZER.encode(text) == expected


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_every_byte_string_is_decoded_as_python_does(watchdog, data):
    watchdog()
    ids = [TOKENIZER.token_to_id(CHARACTERS[byte]) for byte in data]
    assert TOKENIZER.decode(ids) == data.decode("utf-8", "replace")


# Bytes that are no UTF-8 between texts, and characters that are cut in the middle.
DATA = st.lists(st.binary(max_size=3) | MIXED.map(str.encode), max_size=6).map(b"".join)


@given(DATA | st.binary())
def test_every_byte_string_comes_back_with_each_kind(watchdog, any_tokenizer, data):
    watchdog()
    ids = any_tokenizer.encode_bytes(data)
    assert any_tokenizer.decode_bytes(ids) == data
    assert any_tokenizer.decode(ids) == data.decode("utf-8", "replace")
    assert not set(ids) & set(any_tokenizer.special_tokens.values())


@given(TEXTS | MIXED)
def test_every_text_comes_back_with_each_kind(watchdog, any_tokenizer, text):
    watchdog()
    check_lossless(any_tokenizer, text)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1) | st.integers()), st.booleans())
def test_any_ids_are_decoded_or_refused(watchdog, ids, skip_special):
    watchdog()
    tokens = {id_: token for token, id_ in CONTENT["model"]["vocab"].items()}
    if not set(ids) <= tokens.keys():
        with pytest.raises(ValueError, match="token id .* is outside the vocabulary"):
            TOKENIZER.decode(ids, skip_special)
        return
    if skip_special:
        ids = [id_ for id_ in ids if tokens[id_] not in SPECIAL_TOKENS]
    data = bytes(TABLE[character] for id_ in ids for character in tokens[id_])
    assert TOKENIZER.decode(ids, skip_special) == data.decode("utf-8", "replace")
    assert TOKENIZER.decode_bytes(ids, skip_special) == data


@given(MIXED)
def test_special_tokens_count_when_allowed_only(watchdog, text):
    watchdog()
    check_lossless(TOKENIZER, text)
    parts = re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", text)
    expected = []
    for part in parts:
        special = TOKENIZER.special_tokens.get(part)
        expected += TOKENIZER.encode(part) if special is None else [special]
    assert TOKENIZER.encode(text, allow_special=True) == expected


@given(st.text() | st.binary() | st.none() | st.integers() | st.lists(st.text()))
def test_anything_is_encoded_or_refused(watchdog, thing):
    """Lone surrogates among them."""
    watchdog()
    try:
        ids = TOKENIZER.encode(thing)
    except ValueError as error:
        assert re.fullmatch("the text (must be a str|has no UTF-8 form).*", str(error))
    else:
        assert TOKENIZER.decode(ids) == thing


# What a tokenizer.json may hold in these places, most of which would lose text.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
BYTE_LEVEL |= {"use_regex": True}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
PARTS = [
    BYTE_LEVEL,
    {**BYTE_LEVEL, "add_prefix_space": True},
    SPLIT,
    {**SPLIT, "behavior": "MergedWithNext", "pattern": {"Regex": SPLITS["Qwen2"]}},
    {**SPLIT, "behavior": "Isolated", "pattern": {"Regex": "(a+)+$"}},
    {"type": "Digits", "individual_digits": True},
    {"type": "Punctuation", "behavior": "Removed"},
    {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
    {"type": "Lowercase"},
    {"type": "NFKC"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 1},
    {"type": "Fuse"},
    {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]},
    {"type": "Sequence", "normalizers": [], "decoders": [], "pretokenizers": [], "processors": []},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"type": "RobertaProcessing", "sep": ["x", 1], "cls": ["y", 2], "trim_offsets": True,
     "add_prefix_space": True},
    {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    {"direction": "Left", "max_length": 1, "strategy": "OnlyFirst", "stride": 3},
    {"strategy": {"Fixed": 30}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 1,
     "pad_type_id": 0, "pad_token": "<|pad|>"},
    {**json.loads(FILE)["added_tokens"][1], "content": "the", "id": 275},
    ["a", "n"], ["an", "d"], ["\u0120", "\u0120"], "the", "<|endoftext|>", "\u00e9", "a b", "",
    "Removed", "Regex", "WordPiece", 0, 1, 20, 275, 276, 2**32 - 1, -1, 0.5,
]  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


EVERY_BYTE = "".join(map(chr, range(0x800))) + "\ud7ff\ue000\uffff\U00010000\U000c0000\U0010ffff"
KINDS = {
    part["type"]: part for part in reversed(PARTS) if isinstance(part, dict) and "type" in part
}
STEPS = {
    "normalizer": [KINDS["Lowercase"], KINDS["NFKC"], KINDS["Strip"]],
    "pre_tokenizer": [*PARTS[:8], KINDS["Sequence"]],
    "decoder": [BYTE_LEVEL, KINDS["Fuse"], KINDS["Strip"]],
    "post_processor": [BYTE_LEVEL, KINDS["TemplateProcessing"], KINDS["RobertaProcessing"]],
    "truncation": [part for part in PARTS if isinstance(part, dict) and "max_length" in part],
    "padding": [part for part in PARTS if isinstance(part, dict) and "pad_id" in part],
}
ADDED = json.loads(FILE)["added_tokens"]
WORDS_OF_FILE = list(json.loads(FILE)["model"]["vocab"])
NEW = st.sampled_from(["<|new|>", "the", "a", " ", "  ", "\n", "\u00e9", "\u00e9\u0120", "b c"])


@st.composite
def aimed_at(draw, content):
    """One change at a place where it matters, to a value that the library may well take."""
    model, added = content["model"], content["added_tokens"]
    what = draw(st.sampled_from(["step", "cut", "model", "added", "new", "vocab", "merges"]))
    if what == "step":
        step = draw(st.sampled_from(list(STEPS)))
        content[step] = draw(st.sampled_from([None, *STEPS[step]]))
    elif what == "cut":
        cuts = content["pre_tokenizer"]["pretokenizers"]
        cuts[draw(st.integers(0, 2)) :] = draw(st.lists(st.sampled_from(PARTS[:7]), max_size=2))
    elif what == "model":
        values = {
            "dropout": [0.0, 0.5, 1.0],
            "continuing_subword_prefix": ["", "##", "\u0120"],
            "end_of_word_suffix": ["", "</w>", "t"],
            "ignore_merges": [True],
            "unk_token": ["a", "<|pad|>", "none"],
            "fuse_unk": [True],
            "byte_fallback": [True],
        }
        name = draw(st.sampled_from(list(values)))
        model[name] = draw(st.sampled_from(values[name]))
    elif what == "added":
        token = draw(st.sampled_from(added))
        name = draw(st.sampled_from(list(token)))
        values = NEW if name == "content" else st.booleans()
        token[name] = draw(st.integers(0, 280) if name == "id" else values)
    elif what == "new":
        token = {"id": len(model["vocab"]), "content": draw(NEW)}
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        added.append({**ADDED[0], **token, **{name: draw(st.booleans()) for name in names}})
    elif what == "vocab":
        ids = model["vocab"]
        how = draw(st.sampled_from(["rename", "remove", "share", "add"]))
        token = draw(st.sampled_from([word for word in WORDS_OF_FILE if word in ids]))
        if how == "rename":
            ids[draw(NEW)] = ids.pop(token)
        elif how == "remove":
            del ids[token]
        elif how == "share":
            ids[draw(NEW | st.just(token))] = draw(st.integers(0, 280))
        else:
            ids[draw(NEW)] = len(ids)
    else:
        pairs = model["merges"]
        at = draw(st.integers(0, len(pairs)))
        pieces = st.sampled_from(WORDS_OF_FILE[4:])
        pairs[at : at + draw(st.integers(0, 1))] = draw(
            st.lists(st.tuples(pieces, pieces).map(list), max_size=1)
        )


@st.composite
def aimed_json(draw):
    """A tokenizer.json with up to two changes where they matter."""
    content = json.loads(FILE)
    for _ in range(draw(st.integers(0, 2))):
        before = copy.deepcopy(content)
        try:
            draw(aimed_at(content))
        except (KeyError, TypeError, IndexError):  # the first change took the place away
            content = before
        content = copy.deepcopy(content)  # nothing of PARTS may be in it, to be changed next
    return json.dumps(content)


@st.composite
def mutated_json(draw, text):
    """The JSON `text` with one to three of its values replaced, deleted, doubled or renamed."""
    content = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            child = place[key]
            if isinstance(child, dict | list) and child and draw(st.integers(0, 3)):
                place = child
                continue
            edit = draw(st.sampled_from(["part", "anything", "delete", "double"]))
            if edit == "delete":
                del place[key]
            elif edit == "double" and isinstance(place, list):
                place.append(copy.deepcopy(child))
            elif edit == "double":
                place[draw(st.text(max_size=3))] = copy.deepcopy(child)
            else:
                new = draw(st.sampled_from(PARTS) if edit == "part" else ANYTHING)
                place[key] = copy.deepcopy(new)  # the next edit may change it in place
            break
    return json.dumps(content)


@st.composite
def mutated_bytes(draw, data):
    """A file with some bytes overwritten, cut out or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


def as_bytes(text):
    return text.encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@given(
    aimed_json().map(as_bytes)
    | aimed_json().map(as_bytes)
    | mutated_json(FILE).map(as_bytes)
    | mutated_bytes(FILE.encode())
    | st.binary(max_size=50),
    MIXED,
)
def test_a_tokenizer_file_is_lossless_or_refused(watchdog, folder, data, text):
    watchdog()
    file = folder / "tokenizer.json"
    file.write_bytes(data)
    try:
        tokenizer = Tokenizer.load(file)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
        return
    added = [token.content for token in tokenizer._backend.get_added_tokens_decoder().values()]
    for piece in (text, f"the cat {text}\u00e9 {EVERY_BYTE}", "  ".join(["", *added, " b"])):
        check_lossless(tokenizer, piece)
        some = [*tokenizer.encode(piece, allow_special=True), tokenizer.vocab_size - 1]
        for skip_special in (True, False):
            data = tokenizer.decode_bytes(some, skip_special)
            assert tokenizer.decode(some, skip_special) == data.decode("utf-8", "replace")
    ids = sorted(tokenizer._backend.get_vocab(with_added_tokens=True).values())
    assert ids == list(range(tokenizer.vocab_size))
    assert Tokenizer.load(tokenizer.save(folder / "saved.json")).hash == tokenizer.hash


MERGES = ["#version: 0.2", "h e", "t he", "\u0120 the", "a n", "an d"]
MADE = [merge.replace(" ", "") for merge in MERGES[1:]]
VOCAB = json.dumps({token: id_ for id_, token in enumerate([*TABLE, *MADE, "<|endoftext|>"])})


@st.composite
def mutated_merges(draw):
    lines = list(MERGES)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(lines)))
        new = st.lists(st.sampled_from([*lines, "t h", "h", " ", ""]) | st.text(max_size=4))
        lines[at : at + draw(st.integers(0, 2))] = draw(new)
    return as_bytes("\n".join(lines))


@given(
    st.just("\n".join(MERGES).encode())
    | mutated_merges()
    | mutated_bytes("\n".join(MERGES).encode()),
    st.just(VOCAB.encode()) | mutated_json(VOCAB).map(as_bytes) | mutated_bytes(VOCAB.encode()),
    MIXED,
)
def test_gpt2_files_fit_or_are_refused(watchdog, folder, merges, vocab, text):
    watchdog()
    (folder / "vocab.bpe").write_bytes(merges)
    (folder / "encoder.json").write_bytes(vocab)
    try:
        tokenizer = Tokenizer.from_gpt2(folder / "vocab.bpe", folder / "encoder.json")
    except ValueError as error:
        assert str(error).startswith(str(folder)) and "\n" not in str(error)
        return
    check_lossless(tokenizer, text)
    lines = merges.decode().split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version:")]
    made = ["".join(pair) for pair in pairs]
    assert {*TABLE, *made, "<|endoftext|>"} == json.loads(vocab).keys()
    expected = slow_encode(text, json.loads(vocab), pairs, words_of(tokenizer, text))
    assert tokenizer.encode(text) == expected
