"""benchmarks/train_step.py at toy size: both programs train, on the same weights."""

import pytest

pytest.importorskip("transformers")

FLAGS = ("--presets", "moe-tiny", "--batch-size", 1, "--seq-len", 9, "--rounds", 2, "--threads", 1)


@pytest.mark.parametrize("dtype", ["float32", "mixed", "bfloat16"])
def test_train_step_benchmark(start, dtype):
    code, content = start("train_step.py", *FLAGS, "--dtypes", dtype)
    assert code == 0
    assert content["transformers"].startswith("5.")
    [case] = content["cases"]
    assert case["dtype"] == dtype and len(case["step"]) == 3
    for name in case["step"]:
        assert case["last_loss"][name] < case["first_loss"][name] < 10
        # At least weights, gradients and the optimizer's two moments of 4.5M parameters.
        assert 4 * 4.5e6 * 2 < case["memory"][name]["peak"] < 1e9
        assert case["tokens_per_second"][name] == 9 / case["step"][name]["median"]
    ratio = case["step"]["transformers"]["median"] / case["step"]["pyllm"]["median"]
    assert case["ratio"] == ratio != case["ratio_memory_kept"]
    trial = case["experts_trial"]
    timed = {name: value for name, value in trial.items() if isinstance(value, float)}
    assert list(trial) == ["grouped_mm", "batched_mm", "eager"] and "eager" in timed
    assert timed[case["experts_implementation"]] == min(timed.values())
    if dtype == "float32":
        # After the same steps on the same tokens: forward, backward and optimizer did the same.
        ours = case["last_loss"]["pyllm"]
        assert case["last_loss"]["transformers"] == pytest.approx(ours, rel=1e-3)


def test_models_that_differ_are_not_timed(load):
    check_same = load("train_step.py")["check_same"]
    same = {"pyllm": 8.0, "transformers": 8.0007}
    check_same(same, 1e-4)
    for other in (8.001, float("nan")):
        with pytest.raises(RuntimeError, match="the two models are not the same"):
            check_same(same | {"transformers, freed memory kept": other}, 1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seq-len", 513), "--seq-len must be at most the context of moe-tiny (512), got 513"),
        (("--rounds", 1), "rounds must be a whole number from 2"),
    ],
)
def test_impossible_sizes_are_refused(start, capsys, flags, message):
    code, content = start("train_step.py", *FLAGS, *flags)
    assert (code, content) == (2, None)
    assert message in capsys.readouterr().err
