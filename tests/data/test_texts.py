"""Reading documents, splitting them, and the windows that val_bpb is measured on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.data import read_texts, split_documents, story_windows
from pyllm.tokenizers import train_bpe

TOKENIZER = train_bpe(["only a few words"], 260)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_documents_are_exactly_what_stands_between_separators(tmp_path):
    text = (
        "one\n\n two \n<|endoftext|>\n  three<|endoftext|>\nfour\n<|endoftext|>\n\n<|endoftext|>\nx"
    )
    path = write(tmp_path / "a.txt", text)
    assert list(read_texts(path)) == ["one\n\n two ", "  three<|endoftext|>\nfour", "x"]


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n")
    assert list(read_texts(path)) == ["one", "two"]


def test_jsonl_and_parquet(tmp_path):
    rows = [{"text": "a\nb", "story": "x"}, {"text": "c", "story": "y"}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert list(read_texts(path)) == ["a\nb", "c"]
    assert list(read_texts(path, text_column="story")) == ["x", "y"]
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_texts(tmp_path / "a.parquet")) == ["a\nb", "c"]
    with pytest.raises(ValueError, match="no column 'body'; found text, story"):
        list(read_texts(tmp_path / "a.parquet", text_column="body"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b"\n<|endoftext|>\n \n", "no document in it"),
        ("a.txt", b"good\n<|endoftext|>\nb\xffd", "not UTF-8 at byte 20 .0xff.; convert"),
        ("a.csv", b"a,b", "unknown kind of file '.csv'; expected .txt"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}', "line 2: column 'text' holds int"),
        ("a.jsonl", b'{"story": "a"}', "line 1: no column 'text'; found story"),
        ("a.jsonl", b"[1]", "line 1: no column 'text'; found list"),
        ("a.jsonl", b"{", "line 1: not JSON"),
        ("a.parquet", b"nonsense", "not a readable Parquet file"),
    ],
)
def test_bad_files(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=message):
        list(read_texts(path))


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="no such file; give an existing .txt"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="data/none.txt: no such file"):
        read_texts("data/none.txt")
    with pytest.raises(ValueError, match="a folder; give one of the files"):
        read_texts(tmp_path)
    with pytest.raises(ValueError, match="'train' was asked of a file, which has no splits"):
        read_texts(write(tmp_path / "a.txt", "a"), split="train")


def test_split_is_seeded_disjoint_and_complete():
    texts = [f"story {i}" for i in range(200)] + ["story 3"]
    train, valid = split_documents(texts, 0.02, seed=1)
    assert len(valid) == 4
    assert not set(train) & set(valid)
    assert set(train) | set(valid) == set(texts)
    assert (train, valid) == split_documents(texts, 0.02, seed=1)
    assert valid != split_documents(texts, 0.02, seed=2)[1]
    assert [len(part) for part in split_documents(["a", "b"], 0.02)] == [1, 1]


def test_split_errors():
    with pytest.raises(ValueError, match="found 1 different document"):
        split_documents(["a", "a"])
    with pytest.raises(ValueError, match="fraction is 1; expected between 0 and 1"):
        split_documents(["a", "b"], 1)


def test_story_windows_cut_at_a_whole_character():
    (ids, n_bytes), (short, n_short) = story_windows(["a" + "\u00e9" * 600, "", "ab"], TOKENIZER)
    assert n_bytes == 1023
    assert TOKENIZER.decode(ids) == "a" + "\u00e9" * 511
    assert (TOKENIZER.decode(short), n_short) == ("ab", 2)
    with pytest.raises(ValueError, match="max_bytes is 3; expected 4 or more"):
        story_windows(["a"], TOKENIZER, max_bytes=3)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1), st.integers(4, 40))
def test_a_window_is_the_longest_whole_prefix(text, max_bytes):
    [(ids, n_bytes)] = story_windows([text], TOKENIZER, max_bytes)
    prefix = TOKENIZER.decode(ids)
    assert text.startswith(prefix)
    assert len(prefix.encode()) == n_bytes <= max_bytes
    assert prefix == text or n_bytes + len(text[len(prefix)].encode()) > max_bytes
