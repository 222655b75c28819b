"""Token files: what is written is what is read, and every damage is named."""

import json

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
        ({"dtype": "uint32"}, "ids of 4 bytes"),
        ({"count": -1}, "count is -1; expected a whole number, 1 or more"),
        ({"count": "3"}, "count is '3'"),
        ({"end_of_text_id": 260}, "end_of_text_id is 260; expected one below vocab_size, 260"),
    ],
)
def test_a_wrong_sidecar(path, fields, message):
    edit(path, **fields)
    with pytest.raises(ValueError, match=message):
        TokenFile.open(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"dtype": "uint16"}', "\udcff"])
def test_a_damaged_sidecar(path, text):
    sidecar_path(path).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"train\.json: (not JSON|expected the keys)"):
        TokenFile.open(path)


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
