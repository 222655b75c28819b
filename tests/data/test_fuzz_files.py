"""Generated files: what is read is what is there, or one line says what is wrong with it."""

import dataclasses
import hashlib
import io
import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllm.data import SEPARATOR, TokenFile, read_texts, sidecar_path, write_tokens
from pyllm.tokenizers import train_bpe

pytestmark = pytest.mark.fuzz

TOKENIZER = train_bpe(["a first story", "a second story"], 265)
WIDTHS = {"uint16": 2, "uint32": 4}
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 300),
    st.sampled_from([2**16, 2**16 + 1, 2**32, 10**30, "uint16", "uint32", "int8", "0" * 64]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@st.composite
def mutated(draw, data):
    """Bytes of which some are overwritten, cut out or put in, or the rest is missing."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


@st.composite
def token_files(draw):
    """The ids of a .bin file and the bytes of its sidecar: they fit, or one of the two is wrong."""
    dtype = draw(st.sampled_from(list(WIDTHS)))
    vocab_size = draw(st.integers(1, 300) | st.sampled_from([2**16, 2**16 + 1, 2**32, 2**32 + 1]))
    ids = draw(st.lists(st.integers(0, 299), min_size=1, max_size=20))
    if draw(st.booleans()):
        ids = [id_ % vocab_size for id_ in ids]
    data = b"".join(id_.to_bytes(WIDTHS[dtype], "little") for id_ in ids)
    sidecar = {
        "dtype": dtype,
        "count": len(ids),
        "documents": draw(st.integers(1, len(ids))),
        "vocab_size": vocab_size,
        "end_of_text_id": draw(st.integers(0, vocab_size - 1)),
        "tokenizer_hash": TOKENIZER.hash,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    wrong = draw(st.sampled_from(["nothing", "ids", "fields", "text"]))
    if wrong == "ids":
        data = draw(mutated(data))
        if draw(st.booleans()):  # as if written so
            sidecar["sha256"] = hashlib.sha256(data).hexdigest()
            sidecar["count"] = len(data) // WIDTHS[dtype]
    elif wrong == "fields":
        for name in draw(st.lists(st.sampled_from(list(sidecar)), min_size=1, max_size=2)):
            if draw(st.booleans()):
                sidecar[name] = draw(JUNK)
            else:
                sidecar.pop(name, None)
    text = json.dumps(sidecar).encode("utf-8", "surrogatepass")
    return data, draw(mutated(text)) if wrong == "text" else text


def describes(fields, data):
    """Can this sidecar be true of these bytes? Written down once more, with the ids or None."""
    numbers = {"count", "documents", "vocab_size", "end_of_text_id"}
    if not isinstance(fields, dict) or not numbers | {"dtype", "sha256"} <= fields.keys():
        return None
    if fields["dtype"] not in ("uint16", "uint32") or any(
        type(fields[name]) is not int for name in numbers
    ):
        return None
    width = WIDTHS[fields["dtype"]]
    if fields["vocab_size"] > 256**width or len(data) != fields["count"] * width:
        return None
    if not 1 <= fields["documents"] <= fields["count"]:
        return None
    if not 0 <= fields["end_of_text_id"] < fields["vocab_size"]:
        return None
    hexadecimal = re.compile("[0-9a-f]{64}")
    for name in ("sha256", "tokenizer_hash"):
        if not isinstance(fields.get(name), str) or not hexadecimal.fullmatch(fields[name]):
            return None
    return [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]


@given(token_files())
def test_a_token_file_is_what_its_sidecar_says_or_refused(watchdog, folder, files):
    watchdog()
    data, text = files
    path = folder / "a.bin"
    path.write_bytes(data)
    sidecar_path(path).write_bytes(text)
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    ids = describes(fields, data)
    if ids is None:
        for verify in (False, True):
            with pytest.raises(ValueError, match=r"^[^\n]*a\.(bin|json): [^\n]*$"):
                TokenFile.open(path, verify)
        return
    file = TokenFile.open(path)
    assert file.tokens.tolist() == ids
    assert len(file) == len(ids)
    assert dataclasses.asdict(file.sidecar) == {
        name: fields[name] for name in dataclasses.asdict(file.sidecar)
    }
    sound = fields["sha256"] == hashlib.sha256(data).hexdigest()
    if sound and max(ids) < fields["vocab_size"]:
        assert TokenFile.open(path, verify=True).tokens.tolist() == ids
    else:
        with pytest.raises(ValueError, match=r"^[^\n]*a\.bin: (its sha256 is|holds the id)"):
            TokenFile.open(path, verify=True)


@given(
    st.lists(st.text(max_size=8) | st.sampled_from(["", SEPARATOR, "a story\n", "\r"]))
    | st.lists(st.text() | st.none() | st.integers() | st.binary(), max_size=4)
    | st.text(),
    st.sampled_from([None, "uint16", "uint32"]),
)
def test_texts_are_written_as_they_are_or_refused(watchdog, folder, monkeypatch, texts, dtype):
    watchdog()
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # ten thousand would take minutes
    path = folder / "written.bin"
    try:
        expected = [[*TOKENIZER.encode(text), 0] for text in texts if text != ""]
    except ValueError:
        expected = []
    if isinstance(texts, str) or not expected:
        with pytest.raises(ValueError, match=r"^[^\n]*(text|document)[^\n]*$"):
            write_tokens(texts, TOKENIZER, path, dtype)
        return
    file = write_tokens(iter(texts), TOKENIZER, path, dtype)
    assert file.tokens.tolist() == sum(expected, [])
    assert file.tokens.dtype == (dtype or "uint16")
    assert file.sidecar.documents == len(expected)
    TokenFile.open(path, verify=True).require_tokenizer(TOKENIZER)


PIECES = st.sampled_from(
    [SEPARATOR, f"{SEPARATOR}\n", f"\n{SEPARATOR}\n", f" {SEPARATOR}\r\n", "\n", "\r\n", "\r", " "]
)
CHARACTERS = st.text(max_size=4) | st.sampled_from(
    ["a", "\ufeff", "\u00e9", "\x85", "\u2028", "\0"]
)
AS_BYTES = CHARACTERS.map(lambda text: text.encode("utf-8", "surrogatepass"))
TXT = st.lists(PIECES.map(str.encode) | AS_BYTES | st.binary(max_size=2)).map(b"".join)


def slow_documents(data):
    """Line by line, on the whole text at once."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    documents, document = [], ""
    for line in re.findall(r"[^\n]*\n|[^\n]+$", text):
        if line.strip(" \t\n\r\x0b\x0c") == SEPARATOR:
            documents.append(document)
            document = ""
        else:
            document += line
    documents.append(document)
    return [re.sub(r"\r?\n\Z", "", document) for document in documents]


@given(TXT)
def test_a_text_file_is_cut_at_its_separators_or_refused(watchdog, folder, data):
    watchdog()
    path = folder / "a.txt"
    path.write_bytes(data)
    try:
        expected = [text for text in slow_documents(data) if text.strip()]
    except UnicodeDecodeError:
        expected = []
    if not expected or b"\0" in data:
        with pytest.raises(ValueError, match=r"^[^\n]*a\.txt: [^\n]*$"):
            list(read_texts(path))
    else:
        assert list(read_texts(path)) == expected


ROWS = st.one_of(
    st.text().map(lambda text: json.dumps({"text": text}, ensure_ascii=False)),
    st.text().map(lambda text: json.dumps({"id": 1, "text": text})),
    st.dictionaries(st.sampled_from(["text", "a\nb", "id"]), JUNK).map(json.dumps),
    JUNK.map(json.dumps),
    st.sampled_from(
        ["", " ", "{", "[" * 50_000, "9" * 5000, '{"text": NaN}', '{"text": "a"}x', "\r"]
    ),
).map(lambda row: row.encode("utf-8", "surrogatepass"))
JSONL = st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf"]), st.lists(ROWS).map(b"\n".join)
).map(b"".join)  # fmt: skip
GOOD_ROWS = st.lists(st.text().map(lambda text: json.dumps({"text": text}).encode()))


@given(JSONL | GOOD_ROWS.map(b"\n".join) | GOOD_ROWS.map(b"\r\n".join).flatmap(mutated))
def test_json_lines_are_read_or_refused(watchdog, folder, data):
    watchdog()
    path = folder / "a.jsonl"
    path.write_bytes(data)
    expected = []
    try:
        for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
            if line.strip():
                text = json.loads(line.decode("utf-8"))["text"]
                expected += [text.encode("utf-8").decode("utf-8")]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        expected = []
    expected = [text for text in expected if text.strip()]
    if expected:
        assert list(read_texts(path)) == expected
    else:
        with pytest.raises(ValueError, match=r"^[^\n]*a\.jsonl(, line \d+)?: [^\n]*$"):
            list(read_texts(path))


def parquet_files():
    """Small valid files: several compressions, row groups, a dictionary, checksums or none."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"id": list(range(40)), "text": [f"story {i % 7}" for i in range(40)]})
    for compression in ("none", "snappy", "zstd"):
        for checksum in (False, True):
            stream = io.BytesIO()
            parquet.write_table(
                table,
                stream,
                compression=compression,
                row_group_size=15,
                use_dictionary=checksum,
                write_page_checksum=checksum,
            )
            yield stream.getvalue()


PARQUET = list(parquet_files())
STORIES = [f"story {i % 7}" for i in range(40)]


@given(st.sampled_from(PARQUET).flatmap(lambda data: st.tuples(st.just(data), mutated(data))))
def test_a_parquet_file_is_read_or_refused(watchdog, folder, files):
    watchdog()
    whole, data = files
    path = folder / "a.parquet"
    path.write_bytes(data)
    try:
        texts = list(read_texts(path))
    except ValueError as error:
        assert re.fullmatch(r"[^\n]*a\.parquet(, row \d+)?: [^\n]*", str(error))
        assert data != whole
    else:
        assert all(isinstance(text, str) for text in texts)
        if data == whole:
            assert texts == STORIES
