"""config.json of Hugging Face folders: known ones are read right, and what is not known is refused.

transformers itself is not needed here; tests/export compares the models.
"""

import json
from dataclasses import replace
from typing import Any

import pytest

from pyllm.models import ModelConfig
from pyllm.models.hugging_face import read_settings, write_settings

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4}
DENSE = ModelConfig(
    vocab_size=100,
    max_seq_len=64,
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=4,
    d_ff=48,
    norm_eps=1e-6,
    moe_every=0,
    tie_embeddings=False,
)


def test_a_short_one() -> None:
    assert read_settings(LLAMA) == DENSE


# As they stand beside the published weights.
LLAMA_3_2_1B = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu",
  "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
  "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}"""
MISTRAL_7B = """{
  "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}"""
MIXTRAL_8X7B = """{
  "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
  "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
  "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
  "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
  "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32000}"""
SMOLLM2_135M = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
  "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
  "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9,
  "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
  "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
  "use_cache": true, "vocab_size": 49152}"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            LLAMA_3_2_1B,
            ModelConfig(
                vocab_size=128_256,
                max_seq_len=131_072,
                n_layers=16,
                d_model=2048,
                n_heads=32,
                n_kv_heads=8,
                d_ff=8192,
                rope_theta=500_000.0,
                rope_scaling="llama3",
                rope_factor=32.0,
                rope_original_len=8192,
                moe_every=0,
            ),
        ),
        (
            MISTRAL_7B,
            ModelConfig(
                vocab_size=32_000,
                max_seq_len=32_768,
                n_layers=32,
                d_model=4096,
                n_heads=32,
                n_kv_heads=8,
                d_ff=14_336,
                window=4096,
                moe_every=0,
                tie_embeddings=False,
            ),
        ),
        (
            MIXTRAL_8X7B,
            ModelConfig(
                vocab_size=32_000,
                max_seq_len=32_768,
                n_layers=32,
                d_model=4096,
                n_heads=32,
                n_kv_heads=8,
                d_ff=14_336,
                rope_theta=1_000_000.0,
                tie_embeddings=False,
            ),
        ),
        (
            SMOLLM2_135M,
            ModelConfig(
                vocab_size=49_152,
                max_seq_len=8192,
                n_layers=30,
                d_model=576,
                n_heads=9,
                n_kv_heads=3,
                d_ff=1536,
                rope_theta=100_000.0,
                moe_every=0,
            ),
        ),
    ],
    ids=["Llama 3.2 1B", "Mistral 7B", "Mixtral 8x7B", "SmolLM2 135M"],
)
def test_published_models(text: str, expected: ModelConfig) -> None:
    assert read_settings(json.loads(text)) == expected
    # transformers 5 has the same in another spelling.
    new = json.loads(text)
    new["dtype"] = new.pop("torch_dtype")
    scaling = new.pop("rope_scaling", None) or {"rope_type": "default"}
    new["rope_parameters"] = {**scaling, "rope_theta": new.pop("rope_theta")}
    assert read_settings(new) == expected
    assert read_settings(write_settings(expected)) == expected


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, "factor": 4.0, **settings}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, ("linear", 4.0, None)),
        (rope("linear", type="linear", rope_theta=10_000.0), ("linear", 4.0, None)),
        (rope("llama3", **LLAMA3), ("llama3", 4.0, 32)),
        (
            rope("llama3", low_freq_factor=1, high_freq_factor=4)
            | {"original_max_position_embeddings": 16},
            ("llama3", 4.0, 16),
        ),
        (rope("yarn"), ("yarn", 4.0, 64)),
        (
            rope(
                "yarn",
                original_max_position_embeddings=16,
                attention_factor=1.138629436,
                beta_fast=32,
                beta_slow=1,
                mscale=None,
                truncate=True,
                partial_rotary_factor=1.0,
            ),
            ("yarn", 4.0, 16),
        ),
        ({"rope_scaling": {"rope_type": "default"}}, ("none", 1.0, None)),
        ({"rope_scaling": {}}, ("none", 1.0, None)),
    ],
)
def test_scalings(changes: dict[str, Any], expected: tuple[str, float, int | None]) -> None:
    config = read_settings(LLAMA | changes)
    assert (config.rope_scaling, config.rope_factor, config.rope_original_len) == expected


REFUSED = [
    ({"model_type": "qwen2"}, "model_type is 'qwen2'; expected llama, mistral, mixtral, or pyllm"),
    ({"model_type": None}, "model_type is None; expected llama"),
    ({"model_type": ["llama"]}, r"model_type is \['llama'\]; expected llama"),
    (
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures is .*SequenceClassification.*; expected LlamaForCausalLM, the llama model",
    ),
    ({"architectures": ["MistralForCausalLM"]}, "architectures is .*; expected LlamaForCausalLM"),
    (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "its weights are quantised .'gptq'.; expected float32, bfloat16 or float16",
    ),
    ({"quantization_config": {"load_in_8bit": True}}, "its weights are quantised .*load_in_8bit"),
    ({"quantization_config": "fp8"}, "its weights are quantised .'fp8'."),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
    ({"attention_bias": True}, "attention_bias is True; expected False"),
    ({"mlp_bias": True}, "mlp_bias is True; expected False"),
    ({"sliding_window": 16}, "sliding_window is 16; expected None"),
    ({"rope_interleaved": True}, "rope_interleaved is True; expected False"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder is True; expected False"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads is .*; expected {}"),
    ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is .*; expected None"),
    ({"head_dim": 16}, "head_dim is 16; expected hidden_size / num_attention_heads = 8"),
    ({"head_dim": "8"}, "head_dim is '8'; expected"),
    ({"logit_scale": 0.5}, r"unknown settings \['logit_scale'\], which may make another model"),
    ({"use_sliding_window": False}, r"unknown settings \['use_sliding_window'\]"),
    ({"num_local_experts": 4}, r"unknown settings \['num_local_experts'\]"),  # of a Llama
    ({"hidden_size": "remove"}, r"missing settings \['hidden_size'\]"),
    ({"hidden_size": "32"}, "hidden_size must be a whole number of at least 1, got '32'"),
    ({"hidden_size": None}, "hidden_size must be a whole number of at least 1, got None"),
    ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1"),
    ({"num_attention_heads": 5}, "d_model .32. must be a multiple of n_heads .5."),
    ({"num_key_value_heads": 3}, "n_heads .4. must be a multiple of n_kv_heads .3."),
    ({"tie_word_embeddings": None}, "tie_embeddings must be true or false, got None"),
    ({"rms_norm_eps": None}, "norm_eps must be a number from 1e-12 to 1, got None"),
    ({"rope_theta": "big"}, "rope_theta must be a number from 1 to 1e.30, got 'big'"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object or null"),
    (
        rope("yarn", original_max_position_embeddings=8) | {"max_position_embeddings": 10**400},
        "its max_position_embeddings must be a whole number",
    ),
    (rope("dynamic"), "of type 'dynamic'; expected default, linear, llama3 or yarn"),
    (rope("longrope", short_factor=[1.0]), "of type 'longrope'; expected default, linear"),
    (rope("su"), "of type 'su'; expected default"),
    (rope(["yarn"]), r"of type \['yarn'\]; expected default"),
    (rope("linear", type="dynamic"), "rope_type and type differ: 'linear' and 'dynamic'"),
    (rope("linear", factor=0.5), "factor must be a finite number of at least 1, got 0.5"),
    (rope("linear", factor=None), "factor must be a finite number of at least 1, got None"),
    (rope("linear", beta_fast=32), r"of type linear has unknown settings \['beta_fast'\]"),
    (rope("default"), r"of type default has unknown settings \['factor'\]"),
    (rope("linear", rope_theta=5.0) | {"rope_theta": 7.0}, "rope_theta, .* differ: 5.0 and 7.0"),
    (rope("linear", partial_rotary_factor=0.5), "partial_rotary_factor is not 1"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
    (rope("llama3", **LLAMA3 | {"low_freq_factor": 2.0}), "low_freq_factor 2.0; expected 1.0"),
    (rope("llama3", **LLAMA3 | {"high_freq_factor": None}), "high_freq_factor None; expected 4.0"),
    (
        rope("llama3", **LLAMA3) | {"original_max_position_embeddings": 8192},
        "original_max_position_embeddings, which is given twice, differ: 32 and 8192",
    ),
    (
        rope("yarn", original_max_position_embeddings=8),
        "has the factor 4, while .* is 64 / 8 = 8, which transformers 4 takes instead; expected "
        "the two to be the same: max_position_embeddings 32",
    ),
    (rope("yarn", original_max_position_embeddings=64), "has the factor 4, while .* 64 / 64 = 1,"),
    (
        rope("yarn") | {"original_max_position_embeddings": 16},
        "its original_max_position_embeddings, 16, stands outside rope_scaling, where .*; move it",
    ),
    (
        rope("yarn", original_max_position_embeddings=10**400),
        "original_max_position_embeddings must be a whole number from 1 to 2,147,483,648, got",
    ),
    (rope("yarn", attention_factor=1.0), "has attention_factor 1.0; expected 1.138"),
    (rope("yarn", attention_factor=10**400), "has attention_factor .*; expected 1.138"),
    (rope("yarn", beta_fast=16), "has beta_fast 16; expected 32.0"),
    (rope("yarn", beta_slow=2.0), "has beta_slow 2.0; expected 1.0"),
    (rope("yarn", truncate=False), "has truncate False; expected True"),
    (rope("yarn", mscale=1.0, mscale_all_dim=1.0), "unknown settings .'mscale', 'mscale_all_dim'."),
    (
        rope("linear") | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "rope_scaling and rope_parameters differ",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        r"of type default has unknown settings \['full_attention'\]",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_would_be_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    settings = {key: value for key, value in (LLAMA | changes).items() if value != "remove"}
    with pytest.raises(ValueError, match=message):
        read_settings(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 5}, "top_k .5. must not exceed n_experts .4."),
        ({"num_local_experts": None}, "n_experts must be a whole number"),
        ({"sliding_window": 0}, "window must be a whole number from 1"),
        ({"attention_bias": True}, "attention_bias is True; expected False"),
        ({"layer_types": ["full_attention"] * 2}, r"unknown settings \['layer_types'\]"),
    ],
)
def test_what_would_be_another_mixtral_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(MIXTRAL | changes)


def test_a_yarn_that_is_read_in_two_ways_is_not_written() -> None:
    yarn = replace(DENSE, rope_scaling="yarn", rope_factor=4.0, rope_original_len=8)
    with pytest.raises(ValueError, match="has the factor 4, while .* is 64 / 8 = 8, which"):
        write_settings(yarn)
    for original, written in ((16, 16), (64, None)):
        settings = write_settings(replace(yarn, rope_original_len=original))
        assert settings["rope_scaling"].get("original_max_position_embeddings") == written
        assert read_settings(settings) == replace(yarn, rope_original_len=original)
