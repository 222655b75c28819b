"""llama.cpp itself runs the exported files: the same tokens, logits and texts as pyllm.

llama-cpp-python takes a quarter of an hour to build; where it is not installed, test_gguf.py still
reads the files as llama.cpp's sources say. Its kv cache is float32 here: the usual float16 would
differ in the fourth digit.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend

import pyllm
from pyllm._native import cpu_extension
from pyllm.export import read_text_settings, write_gguf
from pyllm.generate import SamplingConfig, generate_ids, generate_text
from pyllm.models import Transformer
from pyllm.tokenizers import Tokenizer, byte_tokenizer, train_bpe, train_characters
from pyllm.tokenizers.lossless import SPLITS

from .conftest import TEXTS, VARIANTS, lively, small
from .foreign import GREEDY, KINDS, PROMPT, change, make_folder, stopping

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: pip install -e '.[bench]'"
)

F32 = 0  # GGML_TYPE_F32
N_TOKENS = 100
WITHOUT_WINDOW = [name for name in VARIANTS if "window" not in VARIANTS[name]]


def opened(path: Path, **settings: object):
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, type_k=F32, type_v=F32, verbose=False, **settings
    )


def talkative(model: Transformer) -> Transformer:
    """Blocks that outweigh the embedding: a random model else repeats its last token for ever."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "w_out")):
                parameter.mul_(8)
    return model


def greedy(llama, ids: list[int]) -> list[int]:
    """The most likely token, a hundred times."""
    new: list[int] = []
    llama.reset()
    llama.eval(ids)
    for _ in range(N_TOKENS):
        new.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(new[-1:])
    return new


@pytest.mark.parametrize("variant", WITHOUT_WINDOW)
def test_llama_cpp_writes_what_pyllm_writes(tokenizer, tmp_path, variant):
    model = talkative(lively(small(tokenizer, max_seq_len=128, **VARIANTS[variant])))
    write_gguf(tmp_path / "m.gguf", model, tokenizer)
    llama = opened(tmp_path / "m.gguf", logits_all=True)
    prompt = "Once there was a fox"
    ids = llama.tokenize(prompt.encode())
    assert ids == [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]

    settings = SamplingConfig(max_new_tokens=N_TOKENS, greedy=True)
    ours = list(generate_ids(model, ids, settings))
    assert len(ours) == N_TOKENS and len(set(ours)) > 10
    assert greedy(llama, ids) == ours
    with torch.inference_mode():
        logits = model(torch.tensor([ids + ours])).logits[0].numpy()
    theirs = llama.scores[: llama.n_tokens]
    assert theirs.shape == logits.shape
    assert np.abs(theirs - logits).max() < 1e-4 * np.abs(logits).max()

    # The same through its ordinary door, which knows of tokens only what the file says.
    answer = llama(prompt, max_tokens=N_TOKENS, temperature=0.0, top_k=1, repeat_penalty=1.0)
    text = generate_text(model, tokenizer, prompt, settings)
    # Bytes that are not UTF-8, as a random model emits them, are left out there.
    assert answer["choices"][0]["text"] == text.replace("\ufffd", "")


def has_amx() -> bool:
    extension = cpu_extension()
    return extension is not None and "amx" in extension.supported_isas()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_narrow_files_are_near(tokenizer, tmp_path, dtype):
    """Within some roundings: 2^-11, 2^-8 and half of 1/127 of the largest of 32 weights.

    A dense model: where two experts are nearly as good, a rounding takes the other one.
    """
    if dtype == "q8_0" and has_amx():
        pytest.skip("ggml's AMX code crashes where GCC 12 compiled it: docs/LOG.md, 2026-11-28")
    model = lively(small(tokenizer))
    write_gguf(tmp_path / "m.gguf", model, tokenizer, dtype)
    llama = opened(tmp_path / "m.gguf", logits_all=True)
    ids = [tokenizer.end_of_text_id, *tokenizer.encode("Once there was a fox")]
    llama.eval(ids)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    wrong = np.sqrt(((llama.scores[: llama.n_tokens] - logits) ** 2).mean()) / logits.std()
    assert 1e-6 < wrong < {"float16": 0.01, "bfloat16": 0.05, "q8_0": 0.05}[dtype]


def with_cut(tokenizer: Tokenizer, split: object, merges: list[list[str]]) -> Tokenizer:
    """With merges that tell one cut from another: of a space and a digit."""
    content = tokenizer.content | {"pre_tokenizer": split}
    content["model"]["merges"] += merges
    vocab = content["model"]["vocab"]
    vocab |= {left + right: len(vocab) + number for number, (left, right) in enumerate(merges)}
    return Tokenizer(Backend.from_str(json.dumps(content)))


def cut(name: str) -> dict[str, object]:
    split = {
        "type": "Split",
        "pattern": {"Regex": SPLITS[name]},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, byte_level(False)]}


def byte_level(use_regex: bool) -> dict[str, object]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(True)],
}
CUTS = {name: cut(name) for name in SPLITS} | {"digits": DIGITS, "ByteLevel": byte_level(True)}


@pytest.mark.parametrize("name", [*CUTS, "GPT-2's own", "bytes", "characters"])
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(shared_data, tmp_path, name):
    """Line by line, the torture files and a text with as many numbers as words."""
    folder = shared_data / "tokenizer"
    files = [folder / "blns.txt", folder / "UTF-8-test.txt"]
    lines = [
        line
        for file in files
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n")
    ]
    lines += ["In 1984,  3.14159 it's 12345 of\t67!\n\n \u0663\u0664 \u00bd\u00bd \u216b x9y"]
    if name == "GPT-2's own":
        tokenizer = Tokenizer.from_gpt2(folder / "gpt2_vocab.bpe", folder / "gpt2_encoder.json")
    elif name == "bytes":
        tokenizer = byte_tokenizer()
    elif name == "characters":
        tokenizer = train_characters(lines, 600)
    else:
        tokenizer = with_cut(train_bpe(TEXTS, 300), CUTS[name], [["\u0120", "1"], ["\u0120", "3"]])
    config = small(tokenizer, n_layers=1, d_model=8, n_heads=2, d_ff=8)
    write_gguf(tmp_path / "m.gguf", Transformer(config), tokenizer)
    llama = opened(tmp_path / "m.gguf", vocab_only=True)
    for line in filter(None, lines):
        theirs = llama.tokenize(line.encode(), add_bos=False)
        assert theirs == tokenizer.encode(line), line
        assert llama.detokenize(theirs) == line.encode()


def test_special_tokens_are_the_same_on_request_only(tokenizer, tmp_path):
    write_gguf(tmp_path / "m.gguf", Transformer(small(tokenizer)), tokenizer)
    llama = opened(tmp_path / "m.gguf", vocab_only=True)
    text = "<|im_start|>user\nHi<|im_end|>\n"
    for special in (False, True):
        theirs = llama.tokenize(text.encode(), add_bos=False, special=special)
        assert theirs == tokenizer.encode(text, allow_special=special)


@pytest.mark.parametrize("kind", ["bare", "llama3"])
def test_a_model_of_others_is_prompted_and_stopped_as_before(
    transformers, tokenizer, tmp_path, kind
):
    folder = make_folder(transformers, tmp_path / "theirs", *KINDS[kind](tokenizer))
    first = pyllm.load(folder, device="cpu")
    stops = [*sorted(first.stop_ids), stopping(first)]
    change(folder, "generation_config.json", eos_token_id=stops)
    source = pyllm.load(folder, device="cpu")
    write_gguf(
        tmp_path / "m.gguf", source.model, source.tokenizer, texts=read_text_settings(source)
    )
    llama = opened(tmp_path / "m.gguf")
    assert llama.tokenize(PROMPT.encode()) == source.prompt_ids(PROMPT)
    answer = llama(PROMPT, max_tokens=60, temperature=0.0, top_k=1, repeat_penalty=1.0)
    text = source.generate(PROMPT, GREEDY)
    assert text != first.generate(PROMPT, GREEDY), "the stop is not reached"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == text.replace("\ufffd", "")
