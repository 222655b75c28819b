"""One optimiser step: what gets a gradient, what is averaged, what is skipped."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pyllm.models import ModelConfig, preset
from pyllm.train import TRAIN_PRESETS, Trainer
from pyllm.train import trainer as trainer_module
from pyllm.train.log import RunLog


def record_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """A dict that after each step holds its gradients, as they are before clipping."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in trainer.model.named_parameters():

        def record(parameter: Tensor, name: str = name) -> None:
            assert parameter.grad is not None
            gradients[name] = parameter.grad.clone()

        parameter.register_post_accumulate_grad_hook(record)
    return gradients


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_router_and_every_expert_get_gradient(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(max_steps=100)
    gradients = record_gradients(trainer)
    reached: dict[str, Tensor] = {}
    for step in range(100):
        trainer.step(step)
        for name, gradient in gradients.items():
            per_row = gradient.abs().flatten(1).sum(1) if gradient.dim() > 1 else gradient.abs()
            reached[name] = reached.get(name, 0) + (per_row > 0).int()
    assert reached.keys() == dict(trainer.model.named_parameters()).keys()
    for name, counts in reached.items():
        if name.endswith(("router", "w_in", "w_out")):
            assert counts.shape == (4,)
            assert counts.min() > 10, f"{name}: {counts.tolist()} of 100 steps"
        elif name != "embedding.weight":
            assert counts.min() > 0, name


@pytest.mark.slow
def test_moe_tiny_reaches_every_expert_and_balances_them(
    make_trainer: Callable[..., Trainer],
) -> None:
    """Two layers of the preset, short sequences, with the balance loss and without."""
    steps = 60
    loads = {}
    for coefficient in (TRAIN_PRESETS["moe-tiny"].balance_coef, 0.0):
        trainer = make_trainer(
            replace(preset("moe-tiny"), vocab_size=300, n_layers=2),
            max_steps=steps,
            batch_size=4,
            seq_len=64,
            learning_rate=TRAIN_PRESETS["moe-tiny"].learning_rate,
            warmup_steps=10,
            balance_coef=coefficient,
        )
        gradients = record_gradients(trainer)
        reached: dict[str, Tensor] = {}
        ratios = []
        for step in range(steps):
            with warnings.catch_warnings():  # without the balance loss, experts do die
                warnings.simplefilter("error" if coefficient else "ignore")
                ratios.append(trainer.step(step)["expert_load_max_over_mean"])
            for name, gradient in gradients.items():
                if name.endswith(("router", "w_in", "w_out")):
                    per_expert = gradient.flatten(1).any(1)
                    reached[name] = reached.get(name, 0) + per_expert.int()
        if coefficient:
            assert len(reached) == 3 * trainer.model.config.n_layers
            for name, counts in reached.items():
                assert counts.shape == (8,) and counts.min() > steps // 4, (
                    f"{name}: {counts.tolist()}"
                )
        loads[coefficient] = sum(ratios[steps // 2 :])
    with_loss, without = loads.values()
    assert with_loss < 0.9 * without


def test_an_unused_expert_gets_none(
    make_trainer: Callable[..., Trainer], tiny: ModelConfig
) -> None:
    # Three tokens choose one expert each: of eight, at least five stay idle.
    trainer = make_trainer(replace(tiny, n_experts=8, top_k=1), batch_size=1, seq_len=3, z_coef=0.0)
    gradients = record_gradients(trainer)
    metrics = trainer.step(0)
    for layer, shares in enumerate(metrics["expert_load"]):
        assert sum(share == 0 for share in shares) >= 5
        for matrix in ("w_in", "w_out"):
            gradient = gradients[f"blocks.{layer}.ffn.{matrix}"]
            for expert, share in enumerate(shares):
                assert (gradient[expert].abs().max() > 0) == (share > 0)


def test_accumulation_averages(make_trainer: Callable[..., Trainer]) -> None:
    # The balance loss is of a micro-batch, not of the step: it is left out.
    whole = make_trainer(batch_size=8, balance_coef=0.0)
    parts = make_trainer(batch_size=4, accumulation=2, balance_coef=0.0)
    of_whole, of_parts = record_gradients(whole), record_gradients(parts)
    one, two = whole.step(0), parts.step(0)
    for name in ("train_loss", "z_loss", "grad_norm", "expert_load_max_over_mean"):
        assert one[name] == pytest.approx(two[name], rel=1e-5), name
    assert of_whole.keys() == of_parts.keys()
    for name in of_whole:
        torch.testing.assert_close(of_parts[name], of_whole[name], rtol=1e-4, atol=1e-6)


def test_the_coefficients_weigh_the_router_losses(make_trainer: Callable[..., Trainer]) -> None:
    routers = {}
    for balance, z in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        trainer = make_trainer(balance_coef=balance, z_coef=z)
        gradients = record_gradients(trainer)
        trainer.step(0)
        routers[balance, z] = gradients["blocks.1.ffn.router"]
    plain = routers.pop((0.0, 0.0))
    assert all((router - plain).abs().max() > 1e-6 for router in routers.values())


def test_the_trainer_moves_router_biases(
    make_trainer: Callable[..., Trainer], tiny: ModelConfig
) -> None:
    trainer = make_trainer(model=replace(tiny, router_bias=True), bias_rate=0.25, accumulation=2)
    metrics = trainer.step(0)
    for layer, block in enumerate(trainer.model.blocks):
        share = metrics["expert_load"][layer]
        wanted = [0.25 * (1 if each < 0.25 else -1 if each > 0.25 else 0) for each in share]
        assert block.ffn.router_bias.tolist() == wanted
    assert any(each != 0.25 for each in share)
    # A step that is skipped moves nothing.
    before = weights(trainer)
    with torch.no_grad():
        trainer.model.final_norm.weight[0] = math.nan
    before["final_norm.weight"] = trainer.model.final_norm.weight.clone()
    assert not math.isfinite(trainer.step(1)["grad_norm"])
    after = weights(trainer)
    biases = [name for name in after if name.endswith("router_bias")]
    assert biases and all(torch.equal(after[name], before[name]) for name in biases)


def test_the_gradient_is_clipped(make_trainer: Callable[..., Trainer]) -> None:
    norms = []

    def measure(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(sum(g.square().sum().item() for g in grads if g is not None))

    for limit, expected in ((0.01, 0.01), (0.0, None)):
        trainer = make_trainer(grad_clip=limit)
        norms.clear()
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(measure)
        before = trainer.step(0)["grad_norm"]
        assert before > 0.1, "reported as it was before clipping"
        assert math.sqrt(sum(norms)) == pytest.approx(expected or before, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recomputing_activations_changes_nothing(
    make_trainer: Callable[..., Trainer],
    tiny: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:
    """Not a bit: also under autocast, with loss scaling, around a step that is skipped, and in the
    router's statistics, which would count a block twice that has run twice."""
    settings: dict[str, Any] = {"accumulation": 2, "batch_size": 4, "max_steps": 4}
    plain, again = (
        make_trainer(replace(tiny, router_bias=True), recompute=recompute, **settings)
        for recompute in (False, True)
    )
    blocks = {id(trainer): 0 for trainer in (plain, again)}
    for trainer in (plain, again):
        trainer.dtype = dtype
        if dtype == torch.float16:
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

        def count(*_: Any, key: int = id(trainer)) -> None:
            blocks[key] += 1

        trainer.model.blocks[0].register_forward_pre_hook(count)
    for step in range(4):
        if step == 2:  # a NaN in the middle of the network
            for trainer in (plain, again):
                with torch.no_grad():
                    trainer.kept = trainer.model.blocks[1].ffn_norm.weight.clone()
                    trainer.model.blocks[1].ffn_norm.weight[0] = math.nan
        one, other = plain.step(step), again.step(step)
        if step == 2:
            assert one["skipped_steps"] == other["skipped_steps"] == 1
            for trainer in (plain, again):
                with torch.no_grad():
                    trainer.model.blocks[1].ffn_norm.weight.copy_(trainer.kept)
            continue
        assert one == other
    assert same(weights(plain), weights(again))
    assert blocks[id(again)] == 2 * blocks[id(plain)]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_loss_falls_with_either_optimizer(
    make_trainer: Callable[..., Trainer], optimizer: str
) -> None:
    trainer = make_trainer(optimizer=optimizer, learning_rate=1e-2, max_steps=40)
    losses = [trainer.step(step)["train_loss"] for step in range(40)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.3)
    assert losses[-1] < losses[0] - 1


def test_a_dead_expert_is_named(
    make_trainer: Callable[..., Trainer], tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "DEAD_AFTER_STEPS", 2)
    # Of eight experts one token uses one: after two steps at least six were idle in each layer.
    trainer = make_trainer(replace(tiny, n_experts=8, top_k=1), batch_size=1, seq_len=1)
    first = trainer.step(0)["expert_load"]
    with pytest.warns(UserWarning, match="raise --train.balance-coef") as caught:
        second = trainer.step(1)["expert_load"]
    messages = [str(warning.message) for warning in caught]
    for layer in range(2):
        dead = [
            e
            for e, shares in enumerate(zip(first[layer], second[layer], strict=True))
            if not any(shares)
        ]
        assert (
            f"MoE layer {layer} of 0 to 1: expert {dead[0]} got no token for 2 steps; raise "
            "--train.balance-coef"
        ) in messages


def test_what_a_step_reports(make_trainer: Callable[..., Trainer]) -> None:
    metrics = make_trainer().step(0)
    assert metrics["lr"] == pytest.approx(3e-3 / 4)  # a quarter of the warmup
    assert metrics["balance_loss"] == pytest.approx(1, abs=0.2)
    for shares in metrics["expert_load"]:
        assert sum(shares) == pytest.approx(1, abs=1e-4)
    busiest = [max(shares) * 4 for shares in metrics["expert_load"]]
    assert metrics["expert_load_max_over_mean"] == pytest.approx(sum(busiest) / 2, abs=1e-3)


def test_a_dense_model_has_no_expert_load(
    make_trainer: Callable[..., Trainer], tiny: ModelConfig
) -> None:
    metrics = make_trainer(replace(tiny, moe_every=0)).step(0)
    assert "expert_load" not in metrics and metrics["balance_loss"] == 0


def test_validation_is_the_same_each_time_and_draws_nothing(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer()
    state = torch.get_rng_state()
    once = trainer.validate()
    assert trainer.validate() == once
    assert once == pytest.approx(math.log(300), abs=0.3)
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sample_disturbs_nothing(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    told, silent = make_trainer(), make_trainer()
    with RunLog(tmp_path, 5, 0, Console(quiet=True)) as log:
        told.sample(log)
    assert (tmp_path / "samples.txt").read_text(encoding="utf-8").startswith("--- step 0\n")
    assert told.step(0)["train_loss"] == silent.step(0)["train_loss"]
    assert same(weights(told), weights(silent))
