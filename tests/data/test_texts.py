"""Reading documents, splitting them, and the windows that val_bpb is measured on."""

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
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
    with pytest.raises(ValueError, match=r"no column 'body'; found \['text', 'story'\]"):
        list(read_texts(tmp_path / "a.parquet", text_column="body"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b"\n<|endoftext|>\n \n", "no document in it"),
        ("a.txt", b"good\n<|endoftext|>\nb\xffd", "not UTF-8 at byte 20 .0xff.; convert"),
        ("a.csv", b"a,b", "unknown kind of file '.csv'; expected .txt"),
        ("a.txt", "UTF-16".encode("utf-16"), "not UTF-8 at byte 0 .0xff.; convert"),
        ("a.txt", "UTF-16".encode("utf-16-le"), "a zero byte at byte 1, as in UTF-16"),
        ("a.txt", b"good\n<|endoftext|>\nb\0", "a zero byte at byte 20, as in UTF-16"),
        ("a.txt", "cut \u00e9".encode()[:-1], "not UTF-8 at byte 4 .0xc3.; convert"),
        ("a.txt", b"surrogate \xed\xa0\x80", "not UTF-8 at byte 10 .0xed.; convert"),
        ("a.txt", b"<|endoftext|>\n" * 3, "no document in it"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}', "line 2: column 'text' holds int"),
        ("a.jsonl", b'{"text": null}', "line 1: column 'text' holds NoneType; expected a string"),
        ("a.jsonl", b'{"story": "a"}', r"line 1: no column 'text'; found \['story'\]"),
        ("a.jsonl", b'{"a\\nb": "a"}', r"line 1: no column 'text'; found \['a\\nb'\]"),
        ("a.jsonl", b"[1]", "line 1: no column 'text'; found list"),
        ("a.jsonl", b"{", "line 1: not JSON"),
        ("a.jsonl", b'{"text": "a"} {"text": "b"}', "line 1: not JSON .*Extra data"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: not UTF-8"),
        (
            "a.jsonl",
            b'{"text": "a\\ud800"}',
            "line 1: column 'text' has no UTF-8 form: character 1",
        ),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON .RecursionError"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000, "line 1: not JSON .*4300"),
        ("a.jsonl", b"\n \n", "no document in it"),
        ("a.parquet", b"nonsense", "not a readable Parquet file"),
    ],
)
def test_bad_files(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=rf"{name}.*{message}") as error:
        list(read_texts(path))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_file_that_may_not_be_read(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", "text")
    path.chmod(0)
    with pytest.raises(PermissionError, match=path.name):
        list(read_texts(path))


def parquet_bytes(column, values, **options):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pa.table({column: values}), stream, **options)
    return stream.getvalue()


def test_parquet_of_other_types(tmp_path):
    path = tmp_path / "a.parquet"
    for values, message in (
        ([1, 2], "row 0: column 'text' holds int; expected a string"),
        (["a", None], "row 1: column 'text' holds NoneType; expected a string"),
        ([b"a"], "row 0: column 'text' holds bytes; expected a string"),
        ([["a"]], "row 0: column 'text' holds list; expected a string"),
    ):
        write(path, parquet_bytes("text", values))
        with pytest.raises(ValueError, match=rf"a\.parquet, {message}"):
            list(read_texts(path))
    write(path, parquet_bytes("a.b", ["x", "y"]))
    assert list(read_texts(path, text_column="a.b")) == ["x", "y"]
    with pytest.raises(ValueError, match=r"no column 'a'; found \['a.b'\]"):
        list(read_texts(path, text_column="a"))


def test_damaged_parquet(tmp_path):
    data = parquet_bytes(
        "text", ["a story " * 50, "another"], compression="none", write_page_checksum=True
    )
    at = data.index(b"story")
    for damaged in (data[:-20], data[20:], data[:at] + b"S" + data[at + 1 :], data[:4]):
        path = write(tmp_path / "a.parquet", damaged)
        with pytest.raises(
            ValueError, match=r"a\.parquet: not a readable Parquet file \("
        ) as error:
            list(read_texts(path))
        assert "\n" not in str(error.value)


def test_a_gigantic_line(tmp_path):
    line = "long " * 2_000_000
    assert list(read_texts(write(tmp_path / "a.txt", line))) == [line]
    assert list(read_texts(write(tmp_path / "a.jsonl", json.dumps({"text": line})))) == [line]


def test_a_byte_order_mark_before_json_and_a_return_at_the_end(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert list(read_texts(path)) == ["a", "b"]
    path = write(tmp_path / "a.txt", b"one\r\r\n<|endoftext|>\ntwo\r")
    assert list(read_texts(path)) == ["one\r", "two\r"]  # one line end less, and no more


def test_suffixes_in_capitals(tmp_path):
    assert list(read_texts(write(tmp_path / "A.TXT", "one"))) == ["one"]
    assert list(read_texts(write(tmp_path / "A.JsonL", '{"text": "two"}'))) == ["two"]
    path = write(tmp_path / "A.PARQUET", parquet_bytes("text", ["three"]))
    assert list(read_texts(path)) == ["three"]
    with pytest.raises(ValueError, match="data/A.TXT: no such file"):
        read_texts("data/A.TXT")


@pytest.mark.parametrize("name", ["https://a.org/b.txt", "HTTP://a/b", "s3://a/b.jsonl"])
def test_a_url_is_no_file(name):
    for place in (name, Path(name)):
        with pytest.raises(ValueError, match="URLs are not read; download the file"):
            read_texts(place)


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
    for fraction in (float("nan"), "0.1", None, True):
        with pytest.raises(ValueError, match="the validation fraction is"):
            split_documents(["a", "b"], fraction)
    with pytest.raises(ValueError, match="seed must be a whole number of at least 0, got 1.5"):
        split_documents(["a", "b"], seed=1.5)
    with pytest.raises(ValueError, match="must be a list or stream of str, got 'ab'"):
        split_documents("ab")
    with pytest.raises(ValueError, match="text 1 must be a str, not list"):
        split_documents(["a", ["b"]])


def test_story_windows_cut_at_a_whole_character():
    (ids, n_bytes), (short, n_short) = story_windows(["a" + "\u00e9" * 600, "", "ab"], TOKENIZER)
    assert n_bytes == 1023
    assert TOKENIZER.decode(ids) == "a" + "\u00e9" * 511
    assert (TOKENIZER.decode(short), n_short) == ("ab", 2)
    for max_bytes in (3, 4.0, True):
        with pytest.raises(ValueError, match="max_bytes must be a whole number of at least 4, got"):
            story_windows(["a"], TOKENIZER, max_bytes=max_bytes)
    with pytest.raises(ValueError, match="text 1 has no UTF-8 form"):
        story_windows(["a", "\ud800"], TOKENIZER)
    with pytest.raises(ValueError, match="text 0 must be a str, not int"):
        story_windows([5], TOKENIZER)


@pytest.mark.fuzz
@given(st.text(st.characters(codec="utf-8"), min_size=1), st.integers(4, 40))
def test_a_window_is_the_longest_whole_prefix(text, max_bytes):
    [(ids, n_bytes)] = story_windows([text], TOKENIZER, max_bytes)
    prefix = TOKENIZER.decode(ids)
    assert text.startswith(prefix)
    assert len(prefix.encode()) == n_bytes <= max_bytes
    assert prefix == text or n_bytes + len(text[len(prefix)].encode()) > max_bytes


def test_a_pipe_is_no_file_to_train_on(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(ValueError, match="p.txt: not a regular file; write what it gives"):
        list(read_texts(tmp_path / "p.txt"))
