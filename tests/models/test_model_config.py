"""A configuration that cannot work is a ValueError that says why."""

import pytest

from pyllm.models import PRESETS, ModelConfig, preset


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1, got 0"),
        ({"n_layers": -2}, "n_layers must be a whole number of at least 1, got -2"),
        ({"d_model": 256.0}, "d_model must be a whole number of at least 1, got 256.0"),
        ({"n_heads": True}, "n_heads must be a whole number of at least 1, got True"),
        ({"max_seq_len": "512"}, "max_seq_len must be a whole number .*, got '512'"),
        ({"moe_every": -1}, "moe_every must be a whole number of at least 0, got -1"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"norm": "batch"}, "norm must be one of rms, layer, got 'batch'"),
        ({"position": "alibi"}, "position must be one of rope, learned, sinusoidal, got 'alibi'"),
        ({"activation": "relu"}, "activation must be one of swiglu, gelu, got 'relu'"),
        ({"norm_eps": 0.0}, "norm_eps must be a positive number, got 0.0"),
        ({"norm_eps": "1e-5"}, "norm_eps must be a positive number, got '1e-5'"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number, got nan"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number, got inf"),
        ({"tie_embeddings": 1}, "tie_embeddings must be true or false, got 1"),
        ({"n_heads": 3}, r"d_model \(256\) must be a multiple of n_heads \(3\)"),
        ({"n_kv_heads": 3}, r"n_heads \(4\) must be a multiple of n_kv_heads \(3\)"),
        ({"d_model": 12, "n_heads": 4}, "rope needs an even head size, .* = 3"),
        ({"top_k": 9}, r"top_k \(9\) must not exceed n_experts \(8\)"),
    ],
)
def test_impossible_settings_are_value_errors(settings, message):
    with pytest.raises(ValueError, match=f"ModelConfig: {message}"):
        ModelConfig(**settings)


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


def test_presets_come_by_name():
    assert all(preset(name) is config for name, config in PRESETS.items())
