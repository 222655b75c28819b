"""Finding a model's folder and a dtype from what the user typed."""

import os
import sys

import pytest
import torch

from pyllm.generate import (
    DecodeTimes,
    find_model,
    peak_memory_bytes,
    pick_dtype,
    time_decode,
)
from pyllm.models import ModelConfig, Transformer


def put(folder, when=1_000_000):
    folder.mkdir(parents=True)
    weights = folder / "model.safetensors"
    weights.touch()
    os.utime(weights, (when, when))


def test_a_run_folder_means_its_best_checkpoint_and_a_model_folder_itself(tmp_path):
    put(tmp_path / "run" / "last")
    assert find_model(tmp_path / "run") == tmp_path / "run" / "last"
    put(tmp_path / "run" / "best")
    assert find_model(tmp_path / "run") == tmp_path / "run" / "best"
    assert find_model(tmp_path / "run" / "last") == tmp_path / "run" / "last"


def test_a_checkpoint_left_between_two_renames_is_found(tmp_path):
    put(tmp_path / "run" / "best.old")
    assert find_model(tmp_path / "run") == tmp_path / "run" / "best"


def test_a_best_checkpoint_that_lost_its_weights_is_not_passed_over(tmp_path):
    for name in ("best", "last"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "last" / "model.safetensors").touch()
    assert find_model(tmp_path / "run") == tmp_path / "run" / "best"


def test_without_a_name_the_run_saved_last_is_taken(tmp_path):
    put(tmp_path / "a" / "best", when=2_000_000)
    put(tmp_path / "b" / "best", when=3_000_000)
    put(tmp_path / "c" / "best", when=1_000_000)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    assert find_model(runs=tmp_path) == tmp_path / "b" / "best"


def test_no_model_is_a_value_error_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="train one with python scripts/train_moe.py"):
        find_model(runs=tmp_path / "runs")
    with pytest.raises(ValueError, match="no such folder; expected a run folder"):
        find_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no model there; expected model.safetensors"):
        find_model(tmp_path)


def test_dtypes_by_name():
    assert pick_dtype("bfloat16") is torch.bfloat16 and pick_dtype() is None
    assert pick_dtype("int8") is torch.int8
    with pytest.raises(ValueError, match="dtype must be one of float32, .*, int8, got 'int4'"):
        pick_dtype("int4")


def test_timing_counts_every_step_of_every_sequence():
    times = time_decode(Transformer(ModelConfig(vocab_size=64, n_layers=1)), 3, 8, 5)
    assert (times.batch, times.prompt_tokens, len(times.steps)) == (3, 8, 5)
    assert min(times.prefill, *times.steps) > 0


def test_two_steps_have_quartiles_between_them():
    low, high = DecodeTimes(1, 8, 0.5, (0.001, 0.03)).quartiles
    assert 0.001 <= low < high <= 0.03


def test_the_summary_of_times():
    times = DecodeTimes(2, 8, 0.5, (0.1, 0.2, 0.3, 0.4, 1.0))
    assert times.median == 0.3 and times.tokens_per_second == pytest.approx(5.0)
    low, high = times.quartiles
    assert 0.1 <= low < 0.3 < high <= 1.0


def test_impossible_timings_are_value_errors():
    model = Transformer(ModelConfig(vocab_size=64, n_layers=1, max_seq_len=16))
    with pytest.raises(ValueError, match="do not fit into the model's context of 16"):
        time_decode(model, 1, 12, 5)
    with pytest.raises(ValueError, match="batch must be a whole number of at least 1, got 0"):
        time_decode(model, 0, 12, 2)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak memory")
def test_peak_memory_is_in_bytes():
    peak = peak_memory_bytes(torch.device("cpu"))
    assert peak is not None and 20 * 2**20 < peak < 2**40
