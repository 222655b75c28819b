"""A configuration that cannot work is a ValueError that says why."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from pyllm.models import PRESETS, ModelConfig, preset


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1 to 2,147,483,647, got 0"),
        ({"n_layers": -2}, "n_layers must be a whole number from 1 to 10,000, got -2"),
        ({"n_layers": 10**9}, "n_layers must be a whole number from 1 to 10,000, got 1000000000"),
        (
            {"d_model": 10**30},
            "d_model must be a whole number .*, got 1000000000000000000000000000",
        ),
        ({"d_model": 10**5000}, "d_model must be a whole number .*, got a value of type int"),
        ({"d_model": 256.0}, "d_model must be a whole number .*, got 256.0"),
        ({"d_ff": float("nan")}, "d_ff must be a whole number .*, got nan"),
        ({"n_heads": True}, "n_heads must be a whole number .*, got True"),
        ({"max_seq_len": "512"}, "max_seq_len must be a whole number .*, got '512'"),
        ({"n_experts": None}, "n_experts must be a whole number .*, got None"),
        ({"moe_every": -1}, "moe_every must be a whole number from 0 to .*, got -1"),
        ({"moe_every": 5}, r"moe_every \(5\) makes none of 4 layers a mixture; give 0"),
        ({"window": 0}, "window must be a whole number from 1 to .*, got 0"),
        ({"window": False}, "window must be a whole number from 1 to .*, got False"),
        ({"norm": "batch"}, "norm must be one of rms, layer, got 'batch'"),
        ({"norm": ["rms"]}, r"norm must be one of rms, layer, got \['rms'\]"),
        ({"position": "alibi"}, "position must be one of rope, learned, sinusoidal, got 'alibi'"),
        ({"activation": np.zeros(2)}, r"activation must be one of swiglu, gelu, got array\("),
        ({"norm_eps": 0.0}, "norm_eps must be a number from 1e-12 to 1, got 0.0"),
        ({"norm_eps": True}, "norm_eps must be a number from 1e-12 to 1, got True"),
        ({"norm_eps": 1e-300}, "norm_eps must be a number from 1e-12 to 1, got 1e-300"),
        ({"norm_eps": "1e-5"}, "norm_eps must be a number from 1e-12 to 1, got '1e-5'"),
        ({"rope_theta": float("nan")}, r"rope_theta must be a number from 1 to 1e\+30, got nan"),
        ({"rope_theta": float("inf")}, r"rope_theta must be a number from 1 to 1e\+30, got inf"),
        ({"rope_theta": 10**400}, r"rope_theta must be a number from 1 to 1e\+30, got 1000"),
        ({"rope_theta": 1e-300}, r"rope_theta must be a number from 1 to 1e\+30, got 1e-300"),
        ({"tie_embeddings": 1}, "tie_embeddings must be true or false, got 1"),
        ({"tie_embeddings": "x" * 10**6}, "tie_embeddings must be true or false, got 'x{76}...$"),
        ({"n_heads": 3}, r"d_model \(256\) must be a multiple of n_heads \(3\)"),
        ({"n_kv_heads": 3}, r"n_heads \(4\) must be a multiple of n_kv_heads \(3\)"),
        ({"d_model": 12, "n_heads": 4}, "rope needs an even head size, .* = 3"),
        ({"top_k": 9}, r"top_k \(9\) must not exceed n_experts \(8\)"),
        ({"rope_scaling": "ntk"}, "rope_scaling must be one of none, linear, llama3, yarn, got"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor must be a number from 1 to"),
        ({"rope_factor": 2.0}, r"rope_factor \(2.0\) and .* need a rope_scaling, got none"),
        (
            {"rope_original_len": 512},
            r"rope_factor \(1.0\) and rope_original_len \(512\) need a rope_scaling",
        ),
        (
            {"rope_scaling": "yarn", "rope_factor": 2},
            "rope_scaling yarn needs rope_original_len, got None",
        ),
        (
            {"rope_scaling": "linear", "position": "learned"},
            "rope_scaling linear needs position rope, got",
        ),
        ({"rope_original_len": 0}, "rope_original_len must be a whole number from 1 to .*, got 0"),
        ({"attention_sinks": 4}, r"attention_sinks \(4\) need a window, got None"),
        ({"attention_sinks": -1}, "attention_sinks must be a whole number from 0 to .*, got -1"),
        (
            {"n_shared_experts": 2**30, "d_ff": 2},
            r"top_k \(2\) and n_shared_experts \(1073741824\) times d_ff \(2\) must be at most",
        ),
        ({"n_shared_experts": 1, "moe_every": 0}, r"n_shared_experts \(1\) .* need experts"),
        (
            {"router_bias": True, "moe_every": 0},
            r"n_shared_experts \(0\) and router_bias \(True\) need",
        ),
        ({"router_bias": 1}, "router_bias must be true or false, got 1"),
    ],
)
def test_impossible_settings_are_value_errors(settings, message):
    with pytest.raises(ValueError, match=f"ModelConfig: {message}") as error:
        ModelConfig(**settings)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_become_plain_ones_that_json_can_hold():
    config = ModelConfig(d_ff=np.int64(8), norm_eps=np.float64(1e-6), rope_theta=500_000)
    assert config == ModelConfig(d_ff=8, norm_eps=1e-6, rope_theta=500_000.0)
    kinds = [type(value) for value in (config.d_ff, config.norm_eps, config.rope_theta)]
    assert kinds == [int, float, float]
    assert json.loads(json.dumps(asdict(config))) == asdict(config)


def test_an_odd_head_size_is_fine_without_rope():
    assert ModelConfig(d_model=12, n_heads=4, position="learned").head_dim == 3


@pytest.mark.parametrize(
    ("moe_every", "sparse"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2])]
)
def test_which_layers_are_mixtures(moe_every, sparse):
    config = ModelConfig(n_layers=5, moe_every=moe_every)
    assert [layer for layer in range(5) if config.is_moe(layer)] == sparse
    assert config.n_moe_layers == len(sparse)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("moe-158m-gtp", "moe-158m-gpt"), ("moe_tiny", "moe-tiny"), ("dense21m", "dense-21m")],
)
def test_an_unknown_preset_names_the_nearest_one(typed, meant):
    with pytest.raises(ValueError, match=f"{typed!r}; did you mean '{meant}'.*Known presets: "):
        preset(typed)
    for other in (None, 5, []):
        with pytest.raises(ValueError, match="unknown preset .*; did you mean"):
            preset(other)


def test_presets_come_by_name():
    assert all(preset(name) is config for name, config in PRESETS.items())
