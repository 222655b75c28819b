"""transformers and pyllm compute the same logits, whichever of the two wrote the folder.

Differences are relative to the largest logit. transformers keeps norms, softmaxes and angles in
float32 whatever its dtype, so float64 differs by some roundings of float32, too.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pyllm
from pyllm.export import TextSettings, write_hugging_face
from pyllm.models import Transformer, load_model, load_transformer
from pyllm.models.folder import load_config

from .conftest import VARIANTS, lively, small

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4}
ARCHITECTURES = {
    "window": "MistralForCausalLM",
    "moe": "MixtralForCausalLM",
    "one-expert": "MixtralForCausalLM",
    "moe-window-untied": "MixtralForCausalLM",
    "moe-yarn": "MixtralForCausalLM",
}


def relative_difference(model: Transformer, theirs, dtype: torch.dtype) -> float:
    """Over 60 positions: several windows of any variant."""
    vocab_size = model.config.vocab_size
    ids = torch.randint(vocab_size, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = model.to(dtype)(ids).logits
        other = theirs.to(dtype)(ids).logits
    assert ours.std() > 0.1, "logits that are all alike would agree with anything"
    return float((ours - other).abs().max() / other.abs().max())


def opened(transformers, folder: Path, dtype: torch.dtype = torch.float64):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_logits_of_an_exported_model(
    transformers, tokenizer, tmp_path, variant
):
    model = lively(small(tokenizer, **VARIANTS[variant]))
    write_hugging_face(tmp_path / "out", model, tokenizer)
    theirs = opened(transformers, tmp_path / "out")
    assert type(theirs).__name__ == ARCHITECTURES.get(variant, "LlamaForCausalLM")
    for dtype, tolerance in TOLERANCES.items():
        assert relative_difference(model, theirs, dtype) < tolerance
    back, _ = load_model(tmp_path / "out", dtype=torch.float64)
    assert back.config == model.config
    state = model.double().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())


THEIRS = {
    "llama": {"num_key_value_heads": 4},
    "llama-mqa-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "llama-llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "llama-yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"sliding_window": 9},
    "mistral-all": {"sliding_window": None},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "mixtral-window": {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 6},
}


def their_model(transformers, variant: str):
    """A model that transformers initialised, with weights so large that all of them matter."""
    kind = variant.partition("-")[0]
    config = {"llama": "LlamaConfig", "mistral": "MistralConfig", "mixtral": "MixtralConfig"}[kind]
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    settings |= THEIRS[variant]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**settings),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("variant", THEIRS)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_pyllm_computes_the_logits_of_a_model_of_transformers(
    transformers, tmp_path, variant, shards
):
    theirs = their_model(transformers, variant)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    model = load_transformer(tmp_path, dtype=torch.float64)
    for dtype, tolerance in TOLERANCES.items():
        assert relative_difference(model, theirs, dtype) < tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_are_read_without_loss(transformers, tmp_path, dtype):
    theirs = their_model(transformers, "mixtral").to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    model = load_transformer(tmp_path)
    wide = torch.float64 if dtype == "float64" else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {wide}
    state = theirs.state_dict()
    expected = state["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(model.state_dict()["blocks.1.ffn.w_in"], expected.to(wide))


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
def test_keys_that_are_left_out_mean_what_transformers_takes(transformers, tmp_path, kind):
    sizes = {
        "model_type": kind,
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    left_out = load_config(tmp_path)
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "full")
    assert len((tmp_path / "full" / "config.json").read_text()) > 400
    assert load_config(tmp_path / "full") == left_out


def test_the_tokenizer_begins_a_text_as_in_training(transformers, tokenizer, tmp_path):
    model = lively(small(tokenizer))
    write_hugging_face(tmp_path / "out", model, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Once there was  a fox's café 12."
    ids = theirs(text).input_ids
    assert ids == [tokenizer.end_of_text_id, *tokenizer.encode(text)]
    assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs.pad_token_id == tokenizer.pad_id
    chat = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"
    _, back = load_model(tmp_path / "out")
    assert back.encode(text) == tokenizer.encode(text)


def test_the_end_of_a_turn_ends_a_text_only_where_the_model_was_tuned_for_it(
    transformers, tokenizer, tmp_path
):
    model, end = lively(small(tokenizer)), tokenizer.end_of_text_id
    tuned = replace(TextSettings.of_tokenizer(tokenizer), stop_ids=[end, 3])
    for name, texts, stops in (("base", None, end), ("tuned", tuned, [end, 3])):
        write_hugging_face(tmp_path / name, model, tokenizer, texts=texts)
        for file in (transformers.GenerationConfig, transformers.AutoConfig):
            assert file.from_pretrained(tmp_path / name).eos_token_id == stops
    assert tokenizer.token_to_id("<|im_end|>") == 3
    assert pyllm.load(tmp_path / "tuned", device="cpu").tuned_for_chat
    assert not pyllm.load(tmp_path / "base", device="cpu").tuned_for_chat


def test_the_dtype_is_as_asked_for(tokenizer, tmp_path):
    model = lively(small(tokenizer))
    write_hugging_face(tmp_path / "half", model, tokenizer, "bfloat16")
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    half = load_transformer(tmp_path / "half").state_dict()
    state = model.state_dict()
    assert all(torch.equal(half[name], state[name].bfloat16().float()) for name in state)
    write_hugging_face(tmp_path / "auto", model.bfloat16(), tokenizer)
    assert json.loads((tmp_path / "auto/config.json").read_text())["torch_dtype"] == "bfloat16"


@contextmanager
def refused(message: str, folder: Path) -> Iterator[None]:
    with pytest.raises(ValueError, match=message):
        yield
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layer"}, "the model's norm is layer, and Llama, Mistral and Mixtral have rms"),
        ({"position": "learned"}, "position is learned, and .* have rope"),
        ({"position": "sinusoidal"}, "position is sinusoidal, and .* have rope"),
        ({"activation": "gelu"}, "activation is gelu, and .* have swiglu"),
        ({"window": 8, "attention_sinks": 2}, "attention_sinks is 2, and .* have 0"),
        ({"moe_every": 1, "n_shared_experts": 1}, "n_shared_experts is 1, and .* have 0"),
        ({"moe_every": 2}, "moe_every is 2, a mixture in some layers only, and Mixtral has one in"),
    ],
)
def test_what_no_architecture_has_is_refused(tokenizer, tmp_path, changes, message):
    model = Transformer(small(tokenizer, **changes))
    with refused(message, tmp_path / "out"):
        write_hugging_face(tmp_path / "out", model, tokenizer)


def test_a_router_bias_is_refused_unless_it_is_zero(transformers, tokenizer, tmp_path):
    model = lively(small(tokenizer, moe_every=1, router_bias=True))
    write_hugging_face(tmp_path / "zero", model, tokenizer)
    assert relative_difference(model, opened(transformers, tmp_path / "zero"), torch.float32) < 1e-4
    model.blocks[1].ffn.router_bias[3] = 1e-3
    with refused("router in layer 1 has a bias that is not zero", tmp_path / "out"):
        write_hugging_face(tmp_path / "out", model, tokenizer)


def test_numbers_that_do_not_fit_are_refused(tokenizer, tmp_path):
    model = Transformer(small(tokenizer))
    with torch.no_grad():
        model.blocks[0].ffn.out_proj.weight[1, 2] = 70_000
    with refused(
        "mlp.down_proj.weight cannot be written as float16: .*beyond its range", tmp_path / "o"
    ):
        write_hugging_face(tmp_path / "o", model, tokenizer, "float16")
    with torch.no_grad():
        model.blocks[0].ffn.out_proj.weight[1, 2] = torch.nan
    with refused("as float32: a number is NaN or infinite", tmp_path / "o"):
        write_hugging_face(tmp_path / "o", model, tokenizer)


def test_other_programs_may_change_the_folder(transformers, tokenizer, tmp_path):
    """A fine-tuning saves weights, settings and tokenizer again, and pyllm loads what it saved."""
    model = lively(small(tokenizer))
    write_hugging_face(tmp_path / "out", model, tokenizer)
    theirs = opened(transformers, tmp_path / "out", torch.float32)
    with torch.no_grad():
        theirs.lm_head.weight[3] += 1
    theirs.save_pretrained(tmp_path / "out")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "out")
    back, its_tokenizer = load_model(tmp_path / "out")
    state = model.state_dict()["embedding.weight"]
    assert torch.equal(back.state_dict()["embedding.weight"][3], state[3] + 1)
    assert its_tokenizer.prefix_ids == [tokenizer.end_of_text_id]
    assert pyllm.load(tmp_path / "out", device="cpu").stop_ids == {tokenizer.end_of_text_id}


def test_an_unknown_dtype_and_a_place_that_is_taken_are_refused(tokenizer, tmp_path):
    model = Transformer(small(tokenizer))
    with refused("dtype q8_0 is not one of a Hugging Face folder; expected auto,", tmp_path / "o"):
        write_hugging_face(tmp_path / "o", model, tokenizer, "q8_0")
    with pytest.raises(ValueError, match="already there; remove it or name another place"):
        write_hugging_face(tmp_path, model, tokenizer)


def test_a_window_as_long_as_the_context_is_still_a_window(tokenizer, tmp_path):
    config = replace(small(tokenizer), window=64)
    write_hugging_face(tmp_path / "out", Transformer(config), tokenizer)
    assert load_config(tmp_path / "out") == config
