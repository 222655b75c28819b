"""A checkpoint in which anything may have happened: refused in one line, or loaded right."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyllm.models import ModelConfig
from pyllm.models.durable import MANIFEST, write_manifest
from pyllm.testing.damage import changed, harms
from pyllm.train import Trainer
from pyllm.train.checkpoint import OPTIMIZER, STATE, WEIGHTS, load_checkpoint

READ = (WEIGHTS, "config.json", "tokenizer.json", OPTIMIZER, STATE, MANIFEST)
MICRO = ModelConfig(
    vocab_size=300, max_seq_len=32, n_layers=1, d_model=8, n_heads=2, d_ff=4, n_experts=2
)
CheckpointCall = Callable[[Trainer, Path], None]


class Saved:
    """A checkpoint, the one before it, and a trainer to load them into."""

    def __init__(self, trainer: Trainer, folder: Path, contents: list[dict[str, bytes]]) -> None:
        self.trainer = trainer
        self.folder = folder
        self.before, self.files = contents
        self.state = self.everything()

    def load(self) -> bool:
        """Load the checkpoint; False where it was refused as it should be."""
        trainer = self.trainer
        try:
            trainer.progress = load_checkpoint(
                self.folder, trainer.model, trainer.optimizers, trainer.scaler, trainer.settings
            )
        except ValueError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 1500, message
            assert str(self.folder) in message, message
            return False
        return True

    def everything(self) -> list[Any]:
        trainer = self.trainer
        optimizers = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
        parts = [trainer.model.state_dict(), *optimizers, vars(trainer.progress)]
        return copy.deepcopy([*parts, torch.get_rng_state()])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture
def saved(
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    save: CheckpointCall,
    monkeypatch: pytest.MonkeyPatch,
) -> Saved:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them
    trainer = make_trainer(MICRO, batch_size=2, seq_len=8)
    contents = []
    for step in range(2):
        trainer.step(step)
        trainer.progress.step += 1
        save(trainer, tmp_path / "last")
        contents.append({name: (tmp_path / "last" / name).read_bytes() for name in READ})
    return Saved(trainer, tmp_path / "last", contents)


@pytest.mark.fuzz
@given(harm=harms(READ))
def test_all_damage_is_seen(
    saved: Saved, watchdog: Callable[[], None], harm: tuple[str, Callable[..., Any]]
) -> None:
    watchdog()
    name, change = harm
    content = change(saved.files[name], saved.before[name])
    with changed(saved.folder / name, content):
        loaded = saved.load()
    if loaded:
        assert same(saved.everything(), saved.state)
        # An entry of the manifest may change whose file is not read here.
        assert content == saved.files[name] or name == MANIFEST


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([2**31, 2**64, 10**30, -(2**70)]),
    st.floats(),
    st.sampled_from(["", "x", "MT19937", "\n"]),
    st.lists(st.integers(-1, 2**40), max_size=3),
    st.dictionaries(st.sampled_from(["step", "0", "x"]), st.none(), max_size=2),
)


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value; of a list only the first and the last."""
    keys = list(node) if isinstance(node, dict) else sorted({0, len(node) - 1} if node else ())
    found = [(node, key) for key in keys]
    for key in keys:
        if isinstance(node[key], dict | list):
            found += places(node[key])
    return found


@pytest.mark.fuzz
@given(data=st.data(), odd=ODD, remove=st.booleans())
def test_a_state_of_any_kind_is_refused_or_loads(
    saved: Saved, watchdog: Callable[[], None], data: st.DataObject, odd: Any, remove: bool
) -> None:
    """The manifest vouches for it here, so its own reader meets it."""
    watchdog()
    content = json.loads(saved.files[STATE])
    node, key = data.draw(st.sampled_from(places(content)))
    if remove:
        del node[key]
    else:
        node[key] = odd
    resigned(saved, STATE, json.dumps(content).encode())


@pytest.mark.fuzz
@given(harm=harms((STATE, OPTIMIZER)))
def test_damage_that_the_manifest_vouches_for_is_refused_or_loads(
    saved: Saved, watchdog: Callable[[], None], harm: tuple[str, Callable[..., Any]]
) -> None:
    watchdog()
    name, change = harm
    content = change(saved.files[name], saved.before[name])
    if isinstance(content, bytes):
        resigned(saved, name, content)


def resigned(saved: Saved, name: str, content: bytes) -> None:
    with (
        changed(saved.folder / name, content),
        changed(saved.folder / MANIFEST, saved.files[MANIFEST]),
    ):
        write_manifest(saved.folder, [each for each in READ if each != MANIFEST])
        saved.load()
