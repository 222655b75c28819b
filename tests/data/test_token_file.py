"""Token files: what is written is what is read, and every damage is named."""

import hashlib
import json
import os

import numpy as np
import pytest

from pyllm.data import TokenFile, read_texts, sidecar_path, write_tokens
from pyllm.tokenizers import train_bpe

TEXTS = ["a first story", "a second <|endoftext|> story", "third"]
TOKENIZER = train_bpe(TEXTS, 260)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "deep" / "train.bin"
    write_tokens(iter(TEXTS), TOKENIZER, path)
    return path


def edit(path, **fields):
    sidecar = json.loads(sidecar_path(path).read_text())
    sidecar_path(path).write_text(json.dumps({**sidecar, **fields}))


def test_each_document_is_followed_by_end_of_text(path):
    file = TokenFile.open(path, verify=True)
    expected = [id_ for text in TEXTS for id_ in [*TOKENIZER.encode(text), 0]]
    assert file.tokens.tolist() == expected
    assert len(file) == len(expected) == file.sidecar.count
    assert (file.sidecar.documents, file.end_of_text_id) == (3, 0)
    assert file.sidecar.tokenizer_hash == TOKENIZER.hash
    assert file.tokens.dtype == np.uint16
    assert sorted(p.name for p in path.parent.iterdir()) == ["train.bin", "train.json"]


def test_uint32(tmp_path):
    file = write_tokens(TEXTS, TOKENIZER, tmp_path / "a.bin", dtype="uint32")
    assert file.tokens.dtype == np.uint32
    assert file.path.stat().st_size == 4 * len(file)


class HugeTokenizer:
    """Stands in for a vocabulary that would take minutes to train."""

    vocab_size = 2**16 + 1
    end_of_text_id = 2**16
    hash = "0" * 64

    def encode_batch(self, texts):
        return [[2**16 - 1] for _ in texts]


def test_a_large_vocabulary_takes_uint32_and_does_not_fit_uint16(tmp_path):
    file = write_tokens(["a"], HugeTokenizer(), tmp_path / "a.bin")
    assert file.tokens.tolist() == [65535, 65536]
    with pytest.raises(ValueError, match="65,537 ids does not fit uint16.*ask for uint32"):
        write_tokens(["a"], HugeTokenizer(), tmp_path / "b.bin", dtype="uint16")
    assert not (tmp_path / "b.bin").exists()


def test_texts_are_streamed_and_a_failure_leaves_the_old_file(path):
    before = path.read_bytes()

    def texts():
        yield from ["x"] * 2500
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_tokens(texts(), TOKENIZER, path)
    assert path.read_bytes() == before
    TokenFile.open(path, verify=True)
    assert len(list(path.parent.iterdir())) == 2


def test_write_errors(tmp_path):
    with pytest.raises(ValueError, match="there is no document to write"):
        write_tokens([], TOKENIZER, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="expected the name of a file that ends in .bin"):
        write_tokens(TEXTS, TOKENIZER, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="uint16 or uint32, not int8"):
        write_tokens(TEXTS, TOKENIZER, tmp_path / "a.bin", dtype="int8")
    for dtype in ("no such type", 5, object()):
        with pytest.raises(ValueError, match="token files hold uint16 or uint32, not"):
            write_tokens(TEXTS, TOKENIZER, tmp_path / "a.bin", dtype=dtype)
    with pytest.raises(ValueError, match="must be a list or stream of str, got 'a text'; put one"):
        write_tokens("a text", TOKENIZER, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="text 1 must be a str, not int"):
        write_tokens(["a", 5], TOKENIZER, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="text 1500 has no UTF-8 form: character 1"):
        write_tokens([*["a"] * 1500, "b\udcff"], TOKENIZER, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="there is no document to write"):
        write_tokens(["", ""], TOKENIZER, tmp_path / "a.bin")
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(ValueError, match=r"folder\.bin: expected the name of a file that ends in"):
        write_tokens(TEXTS, TOKENIZER, tmp_path / "folder.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.bin"]


def test_empty_documents_are_left_out(tmp_path):
    file = write_tokens(["", "a", "", "b"], TOKENIZER, tmp_path / "a.bin")
    assert file.tokens.tolist() == [*TOKENIZER.encode("a"), 0, *TOKENIZER.encode("b"), 0]
    assert file.sidecar.documents == 2


def test_a_token_file_is_replaced_only_when_the_new_one_is_whole(path):
    before = path.read_bytes(), sidecar_path(path).read_bytes()
    for texts in ([], ["a", None]):
        with pytest.raises(ValueError, match="there is no document|text 1 must be a str"):
            write_tokens(texts, TOKENIZER, path)
    assert (path.read_bytes(), sidecar_path(path).read_bytes()) == before


def test_open_missing_or_folder(tmp_path, path):
    with pytest.raises(ValueError, match=r"none\.bin: no such token file"):
        TokenFile.open(tmp_path / "none.bin")
    with pytest.raises(ValueError, match="a folder, where a token file"):
        TokenFile.open(tmp_path)
    sidecar_path(path).unlink()
    with pytest.raises(ValueError, match=r"train\.json: no such sidecar"):
        TokenFile.open(path)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-2], lambda data: data + b"1", lambda _: b""]
)
def test_a_cut_file(path, change):
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="but its sidecar promises .* write it again"):
        TokenFile.open(path)


def test_a_changed_byte_is_found_when_asked(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    TokenFile.open(path)
    with pytest.raises(ValueError, match="its sha256 is .* the file was changed"):
        TokenFile.open(path, verify=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float32"}, "dtype is 'float32'; expected uint16 or uint32"),
        ({"dtype": ["uint16"]}, r"dtype is \['uint16'\]; expected uint16 or uint32"),
        ({"dtype": "uint32"}, "ids of 4 bytes"),
        ({"count": -1}, "count must be a whole number of at least 1, got -1"),
        ({"count": "3"}, "count must be .*, got '3'"),
        ({"count": True}, "count must be .*, got True"),
        ({"count": 3.0}, "count must be .*, got 3.0"),
        ({"count": float("nan")}, "count must be .*, got nan"),
        (
            {"count": 10**30},
            "bytes, but its sidecar promises 1,000,000,000,000,000,000,000,000,000",
        ),
        ({"documents": 0}, "documents must be a whole number from 1 to .*, got 0"),
        ({"documents": 10**6}, "documents must be a whole number from 1 to .*, got 1000000"),
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1 to 65,536, got 0"),
        ({"vocab_size": 2**16 + 1}, "vocab_size must be .* from 1 to 65,536, got 65537"),
        ({"end_of_text_id": 260}, "end_of_text_id must be .* from 0 to 259, got 260"),
        ({"end_of_text_id": None}, "end_of_text_id must be .*, got None"),
        ({"sha256": 5}, "sha256 is 5; expected 64 hexadecimal digits"),
        ({"sha256": "f" * 63 + "\n"}, "sha256 is 'f+.*; expected 64 hexadecimal digits"),
        ({"tokenizer_hash": None}, "tokenizer_hash is None; expected 64 hexadecimal digits"),
    ],
)
def test_a_wrong_sidecar(path, fields, message):
    edit(path, **fields)
    with pytest.raises(ValueError, match=rf"{message}.*write it again from its text") as error:
        TokenFile.open(path, verify=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"dtype": "uint16"}', "\udcff", "[" * 100_000, "9" * 5000],
    ids=range(7),
)
def test_a_damaged_sidecar(path, text):
    sidecar_path(path).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"train\.json: (not JSON|expected the keys)") as error:
        TokenFile.open(path)
    assert "\n" not in str(error.value)


def test_an_id_outside_the_vocabulary(path):
    """Written so, with a sidecar that fits: nothing was changed afterwards."""
    ids = np.array([0, 7, 260, 0], dtype="<u2").tobytes()
    path.write_bytes(ids)
    edit(path, count=4, documents=2, sha256=hashlib.sha256(ids).hexdigest())
    with pytest.raises(ValueError, match="holds the id 260, outside its vocabulary of 260"):
        TokenFile.open(path, verify=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(path):
    for file in (path, sidecar_path(path)):
        file.chmod(0)
        with pytest.raises(PermissionError, match=file.name):
            TokenFile.open(path)
        file.chmod(0o600)


def test_require_tokenizer(path):
    file = TokenFile.open(path)
    file.require_tokenizer(TOKENIZER)
    with pytest.raises(ValueError, match="made by another tokenizer"):
        file.require_tokenizer(train_bpe(["aa aa aa"], 261))


def test_ten_megabytes_take_seconds(shared_data, tmp_path):
    import time

    texts = shared_data / "tinystories" / "train.txt"
    tokenizer = train_bpe(read_texts(texts), 1024)
    start = time.perf_counter()
    file = write_tokens(read_texts(texts), tokenizer, tmp_path / "a.bin")
    assert time.perf_counter() - start < 20
    assert file.sidecar.documents == 12454
