"""Hugging Face's Llama, Mistral and Mixtral: their ``config.json`` and tensor names, both ways.

The three are one architecture in pyllm's terms: RMSNorm, rotary positions in Llama's layout,
SwiGLU, no biases. Mistral adds a window, Mixtral the experts (arXiv:2302.13971, arXiv:2310.06825,
arXiv:2401.04088). Keys and defaults are those of ``transformers`` 4 and 5 (its
``configuration_llama.py``, ``configuration_mistral.py``, ``configuration_mixtral.py`` and
``modeling_rope_utils.py``), tensor names those its ``save_pretrained`` writes and vLLM and
llama.cpp read.

Whatever a ``config.json`` says that would make another model is refused: a key is understood here,
or known to change no number, or an error.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pyllm._checks import check_number, check_size, is_finite, shown
from pyllm.layers.rope_scaling import LLAMA3_HIGH, LLAMA3_LOW, YARN_FAST, YARN_SLOW
from pyllm.models.config import ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
"""``model_type`` and the class that ``architectures`` names beside it."""

_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_ff",
}
"""Their name of a size and ours. All must be given: transformers would take those of a model of 7
billion parameters."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
    "mistral": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "sliding_window": 4096,
    },
    "mixtral": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
"""What transformers takes for a key that is left out."""

_ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),  # of Llama, which has none
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None,),
}
"""Keys of which only these values are the model that pyllm has."""

_HARMLESS = {
    "where it comes from, and how wide its numbers are": "model_type architectures torch_dtype "
    "dtype transformers_version _name_or_path name_or_path unsloth_version unsloth_fixed "
    "is_llama_config transformers.js_config",
    "training, of which nothing is left in the trained model": "initializer_range "
    "attention_dropout router_aux_loss_coef output_router_logits router_jitter_noise",
    # pretraining_tp cuts products into parts and adds them up again.
    "how it is run, with the same numbers": "use_cache pretraining_tp output_attentions "
    "output_hidden_states return_dict use_bfloat16 torchscript chunk_size_feed_forward "
    "_attn_implementation_autoset attn_implementation",
    "tokens and sampling, which the tokenizer and the caller decide": "bos_token_id eos_token_id "
    "pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix max_length min_length "
    "do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p "
    "typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens",
    "tasks other than writing text": "id2label label2id num_labels problem_type finetuning_task "
    "task_specific_params tf_legacy_loss",
}
"""Keys that change no number of the model, by what they are about."""
_READ = (
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta"),
    *("rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    "partial_rotary_factor",
)


def read_settings(settings: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a ``config.json`` describes.

    Raises:
        ValueError: another architecture, quantised weights, a missing size, an unknown key, or a
            value that would make a model pyllm does not have.
    """
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"its model_type is {shown(kind)}; expected {', '.join(ARCHITECTURES)}, or pyllm"
        )
    named = settings.get("architectures")
    if named not in (None, [], [ARCHITECTURES[kind]]):
        raise ValueError(
            f"its architectures is {shown(named)}; expected {ARCHITECTURES[kind]}, the {kind} "
            "model that writes text"
        )
    _check_keys(settings, kind)
    given = DEFAULTS[kind] | dict(settings)
    missing = sorted(_SIZES.keys() - given.keys())
    if missing:
        raise ValueError(f"missing settings {missing}")
    sizes: dict[str, Any] = {
        ours: check_size(theirs, given[theirs], 1) for theirs, ours in _SIZES.items()
    }
    heads = given["num_key_value_heads"]
    experts: dict[str, Any] = {"moe_every": 0}
    if kind == "mixtral":
        experts = {
            "moe_every": 1,
            "n_experts": given["num_local_experts"],
            "top_k": given["num_experts_per_tok"],
        }
    config = ModelConfig(
        **sizes,
        n_kv_heads=sizes["n_heads"] if heads is None else heads,
        norm_eps=given["rms_norm_eps"],
        window=given["sliding_window"] if "sliding_window" in DEFAULTS[kind] else None,
        tie_embeddings=given.get("tie_word_embeddings", False),
        **_read_rope(settings, DEFAULTS[kind]["rope_theta"], sizes["max_seq_len"]),
        **experts,
    )
    if given.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"its head_dim is {shown(given['head_dim'])}; expected hidden_size / "
            f"num_attention_heads = {config.head_dim}"
        )
    return config


def _check_keys(settings: Mapping[str, Any], kind: str) -> None:
    if settings.get("quantization_config") is not None:
        method = settings["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, Mapping) else method
        raise ValueError(
            f"its weights are quantised ({shown(method)}); expected float32, bfloat16 or float16"
        )
    for key, values in _ONE_VALUE.items():
        if key in settings and key not in DEFAULTS[kind] and settings[key] not in values:
            raise ValueError(f"its {key} is {shown(settings[key])}; expected {shown(values[0])}")
    harmless = {key for keys in _HARMLESS.values() for key in keys.split()}
    known = harmless.union(_READ, _SIZES, _ONE_VALUE, DEFAULTS[kind])
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(
            f"unknown settings {unknown[:3]}, which may make another model; remove those that "
            "change nothing"
        )


def _read_rope(
    settings: Mapping[str, Any], default_theta: float, max_seq_len: int
) -> dict[str, Any]:
    """Base and scaling of the rotary positions.

    transformers 4 has ``rope_theta`` and ``rope_scaling`` side by side, transformers 5 all of it in
    ``rope_parameters``, and reads both. Where one key stands in two places, they must agree.
    """
    two = ("rope_scaling", "rope_parameters")
    scaling = _one_of(" and ".join(two), settings, *two)
    if not isinstance(scaling, Mapping | None):
        raise ValueError(f"its rope_scaling is {shown(scaling)}; expected an object or null")
    inner = {key: value for key, value in (scaling or {}).items() if value is not None}
    kind = _one_of("rope_type and type", inner, "rope_type", "type") or "default"
    for key in ("rope_type", "type"):
        inner.pop(key, None)

    def shared(key: str) -> Any:
        """A key that may stand inside, outside, or in both places."""
        pair = {"inside": inner.pop(key, None), "outside": settings.get(key)}
        return _one_of(f"{key}, which is given twice,", pair, "inside", "outside")

    theta = shared("rope_theta")
    theta = default_theta if theta is None else theta
    if shared("partial_rotary_factor") not in (None, 1):
        raise ValueError("its partial_rotary_factor is not 1; expected whole heads to be turned")
    is_inside = "original_max_position_embeddings" in inner
    original_len = shared("original_max_position_embeddings")
    rope: dict[str, Any] = {"rope_theta": theta}
    if kind == "default":
        expected: dict[str, Any] = {}
    elif kind in ("linear", "llama3", "yarn"):
        rope |= {"rope_scaling": kind, "rope_factor": _factor(inner)}
        expected = _scaling_constants(kind, rope["rope_factor"])
        if kind != "linear":
            rope["rope_original_len"] = max_seq_len if original_len is None else original_len
        if kind == "yarn" and original_len is not None:
            if not is_inside and original_len != max_seq_len:
                raise ValueError(
                    f"its original_max_position_embeddings, {shown(original_len)}, stands outside "
                    "rope_scaling, where transformers 4 does not look for it; move it inside"
                )
            if is_inside:
                check_size("its original_max_position_embeddings", original_len, 1, 2**31)
                check_size("its max_position_embeddings", max_seq_len, 1, 2**31)
                _check_yarn(rope["rope_factor"], original_len, max_seq_len)
    else:
        raise ValueError(
            f"its rope_scaling is of type {shown(kind)}; expected default, linear, llama3 or yarn"
        )
    unknown = sorted(inner.keys() - expected.keys())
    if unknown:
        raise ValueError(f"its rope_scaling of type {kind} has unknown settings {unknown[:3]}")
    for key, value in expected.items():
        found: Any = inner.get(key, None if kind == "llama3" else value)
        close = is_finite(found) and math.isclose(found, value, rel_tol=1e-6)
        if found is not value and not close:
            raise ValueError(
                f"its rope_scaling of type {kind} has {key} {shown(found)}; expected {value}"
            )
    return rope


def _check_yarn(factor: float, original_len: int, max_seq_len: int) -> None:
    """One factor, whoever reads it.

    Where the original length is given in ``rope_scaling``, transformers from 4.45 to 4.57 takes
    ``max_position_embeddings`` by it for the factor, and not the one that stands beside it, as
    transformers 5, vLLM and llama.cpp do.
    """
    if not math.isclose(factor, max_seq_len / original_len, rel_tol=1e-6):
        raise ValueError(
            f"its rope_scaling of type yarn has the factor {factor:g}, while "
            "max_position_embeddings / original_max_position_embeddings is "
            f"{max_seq_len} / {original_len} = {max_seq_len / original_len:g}, which "
            "transformers 4 takes instead; expected the two to be the same: "
            f"max_position_embeddings {factor * original_len:g}"
        )


def _factor(inner: dict[str, Any]) -> float:
    return check_number("its rope_scaling's factor", inner.pop("factor", None), 1)


def _scaling_constants(kind: str, factor: float) -> dict[str, Any]:
    """The settings of a scaling that pyllm has no choice in."""
    if kind == "llama3":
        return {"low_freq_factor": LLAMA3_LOW, "high_freq_factor": LLAMA3_HIGH}
    if kind == "yarn":
        return {
            "attention_factor": 0.1 * math.log(factor) + 1,
            "beta_fast": YARN_FAST,
            "beta_slow": YARN_SLOW,
            "truncate": True,
        }
    return {}


def _one_of(what: str, settings: Mapping[str, Any], first: str, second: str) -> Any:
    a, b = settings.get(first), settings.get(second)
    if a is not None and b is not None and a != b:
        raise ValueError(f"its {what} differ: {shown(a)} and {shown(b)}; keep the right one")
    return b if a is None else a


def write_settings(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model, without the ids of its special tokens.

    In the spelling of transformers 4, which 5, vLLM and llama.cpp read as well.

    Raises:
        ValueError: none of the three architectures has what the model has.
    """
    check_expressible(config)
    kind = "mixtral" if config.moe_every else "llama" if config.window is None else "mistral"
    settings: dict[str, Any] = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
    }
    if config.rope_scaling != "none":
        scaling: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
        original_len = config.rope_original_len
        # A yarn that was trained at its full length leaves the key out: that means the same to
        # transformers 4 and 5, and factor counts in both.
        full = config.rope_scaling == "yarn" and original_len == config.max_seq_len
        if original_len is not None and not full:
            scaling["original_max_position_embeddings"] = original_len
            if config.rope_scaling == "yarn":
                _check_yarn(config.rope_factor, original_len, config.max_seq_len)
        if config.rope_scaling == "llama3":  # which leaves nothing to defaults, as yarn does
            scaling |= _scaling_constants("llama3", config.rope_factor)
        settings["rope_scaling"] = scaling
    if kind == "llama":
        return settings | {"attention_bias": False, "mlp_bias": False}
    settings["sliding_window"] = config.window
    if kind == "mixtral":
        settings["num_local_experts"] = config.n_experts
        settings["num_experts_per_tok"] = config.top_k
    return settings


def check_expressible(config: ModelConfig) -> None:
    """Is the model a Llama, a Mistral or a Mixtral?

    Raises:
        ValueError: it is not; the first setting that is not theirs.
    """
    theirs = {
        "norm": (config.norm, "rms"),
        "position": (config.position, "rope"),
        "activation": (config.activation, "swiglu"),
        "attention_sinks": (config.attention_sinks, 0),
        "n_shared_experts": (config.n_shared_experts, 0),
    }
    for name, (given, expected) in theirs.items():
        if given != expected:
            raise ValueError(
                f"the model's {name} is {given}, and Llama, Mistral and Mixtral have {expected}; "
                "it cannot be exported"
            )
    if config.moe_every > 1:
        raise ValueError(
            f"the model's moe_every is {config.moe_every}, a mixture in some layers only, and "
            "Mixtral has one in every layer; it cannot be exported"
        )


class Part(NamedTuple):
    """A tensor in a Hugging Face folder."""

    name: str
    shape: tuple[int, ...]


def tensor_parts(config: ModelConfig) -> Iterator[tuple[str, list[Part]]]:
    """Each of our tensors, and those of theirs that it is made of.

    The rows of the parts, one part after the other, are the rows of ours (of which all sizes but
    the last are taken as one): queries, keys, values; gate, up; expert after expert.
    """
    width, hidden = config.d_model, config.d_ff
    kv_rows = config.n_kv_heads * config.head_dim
    yield "embedding.weight", [Part("model.embed_tokens.weight", (config.vocab_size, width))]
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        yield f"{ours}.attention_norm.weight", [Part(f"{theirs}.input_layernorm.weight", (width,))]
        yield (
            f"{ours}.attention.qkv_proj.weight",
            [
                Part(f"{theirs}.self_attn.{name}_proj.weight", (rows, width))
                for name, rows in (("q", width), ("k", kv_rows), ("v", kv_rows))
            ],
        )
        yield (
            f"{ours}.attention.out_proj.weight",
            [Part(f"{theirs}.self_attn.o_proj.weight", (width, width))],
        )
        yield (
            f"{ours}.ffn_norm.weight",
            [Part(f"{theirs}.post_attention_layernorm.weight", (width,))],
        )
        if config.is_moe(layer):
            moe = f"{theirs}.block_sparse_moe"
            experts = [f"{moe}.experts.{expert}" for expert in range(config.n_experts)]
            yield f"{ours}.ffn.router", [Part(f"{moe}.gate.weight", (config.n_experts, width))]
            yield (
                f"{ours}.ffn.w_in",
                [
                    Part(f"{expert}.{name}.weight", (hidden, width))
                    for expert in experts
                    for name in ("w1", "w3")
                ],
            )
            yield (
                f"{ours}.ffn.w_out",
                [Part(f"{expert}.w2.weight", (width, hidden)) for expert in experts],
            )
        else:
            yield (
                f"{ours}.ffn.in_proj.weight",
                [
                    Part(f"{theirs}.mlp.{name}_proj.weight", (hidden, width))
                    for name in ("gate", "up")
                ],
            )
            yield (
                f"{ours}.ffn.out_proj.weight",
                [Part(f"{theirs}.mlp.down_proj.weight", (width, hidden))],
            )
    yield "final_norm.weight", [Part("model.norm.weight", (width,))]
    if not config.tie_embeddings:
        yield "output.weight", [Part("lm_head.weight", (config.vocab_size, width))]
