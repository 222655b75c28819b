"""Model folders: what is saved comes back bitwise, damage is told, a kill leaves a whole one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyllm.models import ModelConfig, Transformer, load_model, save_model
from pyllm.models.folder import load_config, settle_folder, write_folder
from pyllm.tokenizers import Tokenizer, train_bpe


def make_tokenizer(word: str) -> Tokenizer:
    return train_bpe([f"Once there was a {word}. "] * 20, 280)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Transformer, Tokenizer]:
    tokenizer = make_tokenizer("fox")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        max_seq_len=16,
        n_layers=2,
        d_model=16,
        d_ff=8,
        moe_every=2,
        window=9,
        rope_theta=123.456789,
    )
    torch.manual_seed(0)
    model = Transformer(config)
    folder = tmp_path_factory.mktemp("runs") / "model"
    save_model(folder, model, tokenizer)
    return folder, model, tokenizer


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "model"))


def test_what_was_saved_comes_back_bitwise(saved):
    folder, model, tokenizer = saved
    loaded, its_tokenizer = load_model(folder)
    assert loaded.config == model.config and not loaded.training
    assert its_tokenizer.hash == tokenizer.hash
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_untied_model_comes_back_too(saved, tmp_path):
    _, model, tokenizer = saved
    untied = Transformer(replace(model.config, tie_embeddings=False, norm="layer"))
    save_model(tmp_path / "m", untied, tokenizer)
    loaded, _ = load_model(tmp_path / "m")
    assert torch.equal(loaded.output.weight, untied.output.weight)


def test_loading_in_another_dtype(saved):
    loaded, _ = load_model(saved[0], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file_is_a_value_error(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no "):
        load_model(folder)


def test_a_missing_folder_is_a_value_error_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="no such file; expected a model folder, such as runs/"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_truncated_weights_are_a_value_error(folder, size):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load_model(folder)


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_a_surplus_and_a_misshapen_tensor_are_value_errors(folder):
    change_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"unknown tensors \['extra'\]"):
        load_model(folder)
    change_tensors(folder, lambda tensors: [tensors.pop("extra"), tensors.pop("embedding.weight")])
    with pytest.raises(ValueError, match=r"missing tensors \['embedding.weight'\]"):
        load_model(folder)
    change_tensors(folder, lambda tensors: tensors.update({"embedding.weight": torch.zeros(3, 2)}))
    with pytest.raises(ValueError, match=r"embedding.weight must have shape .*, got \(3, 2\)"):
        load_model(folder)


def change_config(folder: Path, **settings) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | settings
    kept = {key: value for key, value in content.items() if value != "remove"}
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_wings": 2}, r"unknown settings \['n_wings'\]"),
        ({"d_model": "remove"}, r"missing settings \['d_model'\]"),
        ({"model_type": "llama"}, "expected a model of type 'pyllm', got 'llama'"),
        ({"n_heads": 3}, "config.json: ModelConfig: d_model .16. must be a multiple of n_heads"),
        ({"d_ff": "8"}, "config.json: ModelConfig: d_ff must be a whole number"),
        ({"norm_eps": "small"}, "config.json: ModelConfig: norm_eps"),
        ({"tie_embeddings": "yes"}, "config.json: ModelConfig: tie_embeddings"),
        ({"d_ff": 12}, "must have shape"),
    ],
)
def test_wrong_settings_are_value_errors(folder, settings, message):
    change_config(folder, **settings)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\xff"])
def test_a_config_that_is_no_json_object_is_a_value_error(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="not a JSON file|expected a JSON object, got list"):
        load_config(folder)


def test_another_tokenizer_is_a_value_error(folder):
    make_tokenizer("wolf").save(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="is not the tokenizer this model was trained with"):
        load_model(folder)


class Kill(BaseException):
    """Nothing but the operating system goes on after this."""


def fill_with(text: str):
    return lambda folder: (folder / "file").write_text(text)


def test_an_error_while_writing_leaves_the_old_folder(tmp_path):
    target = tmp_path / "best"
    write_folder(target, fill_with("old"))

    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(target, fail)
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("n_renames", [0, 1, 2])
def test_a_kill_between_the_renames_leaves_a_whole_folder(tmp_path, monkeypatch, n_renames):
    target = tmp_path / "best"
    write_folder(target, fill_with("old"))
    done = 0
    rename = Path.rename

    def dying_rename(self, other):
        nonlocal done
        if done == n_renames:
            raise Kill
        done += 1
        return rename(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying_rename)
        if n_renames < 2:
            with pytest.raises(Kill):
                write_folder(target, fill_with("new"))
        else:  # both are made; the kill falls before the old folder is cleared away
            patch.setattr("pyllm.models.folder._sync", lambda path: None)
            removals = iter([None, None])

            def dying_rmtree(path, ignore_errors=False):
                if next(removals, "dead") == "dead":
                    raise Kill

            patch.setattr(shutil, "rmtree", dying_rmtree)
            with pytest.raises(Kill):
                write_folder(target, fill_with("new"))
    settle_folder(target)
    assert (target / "file").read_text() == ("new" if n_renames == 2 else "old")
    write_folder(target, fill_with("newest"))
    assert (target / "file").read_text() == "newest"
    assert list(tmp_path.iterdir()) == [target]


def test_a_model_is_loaded_after_a_kill_between_the_renames(folder):
    folder.rename(folder.with_name("model.old"))
    load_model(folder)
    # The trainer may be between its two renames right now: a reader leaves the names alone.
    assert not folder.exists()
