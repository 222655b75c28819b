"""GGUF files, read back with the gguf package: numbers, metadata, vocabulary, refusals."""

import errno
import sys

import gguf
import numpy as np
import pytest
import torch

from pyllm.export import write_gguf
from pyllm.models import Transformer

from .conftest import VARIANTS, lively, small
from .ggml_forward import GGUF, logits

WITHOUT_WINDOW = [name for name in VARIANTS if "window" not in VARIANTS[name]]


@pytest.mark.parametrize("variant", WITHOUT_WINDOW)
def test_the_file_is_the_model_as_llama_cpp_reads_it(tokenizer, tmp_path, variant):
    model = lively(small(tokenizer, **VARIANTS[variant]))
    write_gguf(tmp_path / "m.gguf", model, tokenizer)
    file = GGUF(tmp_path / "m.gguf")
    assert set(file.types.values()) == {"F32"}
    ids = torch.randint(tokenizer.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = model.double()(ids).logits[0].numpy()
    difference = np.abs(ours - logits(file, ids[0].tolist())).max()
    assert difference < 1e-5 * np.abs(ours).max() and ours.std() > 0.1


def test_metadata(tokenizer, tmp_path):
    config = small(tokenizer, moe_every=1, n_experts=5, top_k=3, **VARIANTS["yarn"])
    write_gguf(tmp_path / "m.gguf", lively(config), tokenizer, "float16", name="fox")
    fields = GGUF(tmp_path / "m.gguf").fields
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "fox",
        "general.file_type": gguf.LlamaFileType.MOSTLY_F16,
        "general.quantization_version": 2,
        "llama.vocab_size": tokenizer.vocab_size,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-4),
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 1000.0,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
        "llama.expert_count": 5,
        "llama.expert_used_count": 3,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.bos_token_id": tokenizer.end_of_text_id,
        "tokenizer.ggml.eos_token_id": tokenizer.end_of_text_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    longer = {"tokens", "token_type", "merges", "pre"}
    assert fields.keys() == {
        *expected,
        *(f"tokenizer.ggml.{name}" for name in longer),
        "tokenizer.chat_template",
        *("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"),
    }
    assert {name: fields[name] for name in expected} == expected
    assert "generation" not in fields["tokenizer.chat_template"].replace("generation_prompt", "")


def test_the_chat_template_says_the_same_without_its_marks(tokenizer, tmp_path):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    write_gguf(tmp_path / "m.gguf", lively(small(tokenizer)), tokenizer)
    template = GGUF(tmp_path / "m.gguf").fields["tokenizer.chat_template"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16"), ("q8_0", "Q8_0")],
)
def test_numbers_in_each_dtype(tokenizer, tmp_path, dtype, kind):
    """Matrices are as near as the dtype allows; norms and routers are exact."""
    model = lively(small(tokenizer, moe_every=1, tie_embeddings=False))
    write_gguf(tmp_path / "exact.gguf", model, tokenizer, "float32")
    write_gguf(tmp_path / "m.gguf", model, tokenizer, dtype)
    exact, file = GGUF(tmp_path / "exact.gguf"), GGUF(tmp_path / "m.gguf")
    assert exact.tensors.keys() == file.tensors.keys()
    for name, expected in exact.tensors.items():
        found = file.tensors[name]
        if "norm" in name or name.endswith("ffn_gate_inp.weight"):
            assert file.types[name] == "F32" and np.array_equal(found, expected)
            continue
        assert file.types[name] == kind
        if kind == "Q8_0":
            # 127 steps to the largest of 32 numbers, half a step wrong at most, and a scale in
            # float16.
            blocks = np.abs(expected).reshape(-1, 32)
            largest = blocks.max(-1, keepdims=True)
            wrong = np.abs(found - expected).reshape(-1, 32)
            assert (wrong <= largest * (0.5 / 127 + 2**-11)).all()
        else:
            rounded = torch.from_numpy(expected).float().to(getattr(torch, dtype)).double()
            assert np.array_equal(found, rounded.numpy())


def test_auto_is_the_dtype_of_the_weights(tokenizer, tmp_path):
    write_gguf(tmp_path / "m.gguf", lively(small(tokenizer)).bfloat16(), tokenizer)
    assert GGUF(tmp_path / "m.gguf").types["blk.0.attn_q.weight"] == "BF16"


def test_tokens_and_merges(tokenizer, tmp_path):
    """Three ids more than the tokenizer has, as in a vocabulary padded to a round number."""
    size = tokenizer.vocab_size + 3
    write_gguf(tmp_path / "m.gguf", lively(small(tokenizer, vocab_size=size)), tokenizer)
    fields = GGUF(tmp_path / "m.gguf").fields
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == size == len(set(tokens))
    for id_ in range(tokenizer.vocab_size):
        assert tokenizer.token_to_id(tokens[id_]) == id_
        special = tokens[id_] in tokenizer.special_tokens
        assert kinds[id_] == (gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL)
    assert kinds[-3:] == [gguf.TokenType.UNUSED] * 3
    merges = [" ".join(merge) for merge in tokenizer.content["model"]["merges"]]
    assert fields["tokenizer.ggml.merges"] == merges and len(merges) > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layer"}, "the model's norm is layer"),
        ({"position": "learned"}, "position is learned"),
        ({"activation": "gelu"}, "activation is gelu"),
        ({"moe_every": 2}, "moe_every is 2, a mixture in some layers only"),
        ({"moe_every": 1, "n_shared_experts": 1}, "n_shared_experts is 1"),
        ({"window": 64, "attention_sinks": 2}, "attention_sinks is 2"),
        ({"window": 63}, "window is 63, and llama.cpp's llama architecture lets every token see"),
    ],
)
def test_a_model_that_llama_cpp_would_run_differently_is_refused(
    tokenizer, tmp_path, changes, message
):
    model = Transformer(small(tokenizer, **changes))
    with pytest.raises(ValueError, match=f"{message}.*; it cannot be exported"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_hides_nothing_is_none(tokenizer, tmp_path):
    write_gguf(tmp_path / "m.gguf", Transformer(small(tokenizer, window=64)), tokenizer)


def test_a_router_bias_is_refused_unless_it_is_zero(tokenizer, tmp_path):
    model = Transformer(small(tokenizer, moe_every=1, router_bias=True))
    write_gguf(tmp_path / "zero.gguf", model, tokenizer)
    model.blocks[0].ffn.router_bias[0] = -1e-3
    with pytest.raises(ValueError, match="router in layer 0 has a bias that is not zero"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer)


@pytest.mark.parametrize("changes", [{"d_ff": 48}, {"d_model": 48}])
def test_rows_that_q8_0_cannot_hold_are_refused(tokenizer, tmp_path, changes):
    model = Transformer(small(tokenizer, **changes))
    with pytest.raises(ValueError, match="is 48, and q8_0 stores rows in blocks of 32; choose an"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer, "q8_0")


def test_numbers_that_float16_does_not_have_are_refused(tokenizer, tmp_path):
    model = Transformer(small(tokenizer))
    with torch.no_grad():
        model.embedding.weight[5, 3] = -70_000
    with pytest.raises(ValueError, match="token_embd.weight cannot be written as float16: .*range"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer, "float16")
    assert list(tmp_path.iterdir()) == []


def test_other_mistakes_are_value_errors(tokenizer, tmp_path, monkeypatch):
    model = Transformer(small(tokenizer))
    with pytest.raises(ValueError, match="dtype q4_0 is not one of a gguf export; expected auto, "):
        write_gguf(tmp_path / "m.gguf", model, tokenizer, "q4_0")
    with pytest.raises(ValueError, match="dtype float64 is not one of a gguf export"):
        write_gguf(tmp_path / "m.gguf", model.double(), tokenizer)
    with pytest.raises(ValueError, match="already there; remove it or name another place"):
        write_gguf(tmp_path, model, tokenizer)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="the package gguf, which is not installed; pip install"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer)


def test_a_full_disk_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def full(self, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left on device: '.*m.gguf'"):
        write_gguf(tmp_path / "m.gguf", Transformer(small(tokenizer)), tokenizer)
    assert list(tmp_path.iterdir()) == []
