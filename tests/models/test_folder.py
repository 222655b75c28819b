"""Model folders: what is saved comes back bitwise, damage is told, a kill leaves a whole one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyllm.models import ModelConfig, Transformer, load_model, save_model
from pyllm.models.durable import (
    MANIFEST,
    check_manifest,
    settle_folder,
    write_folder,
    write_manifest,
)
from pyllm.models.folder import load_config
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
    """A copy to damage, without a manifest, as another program writes it."""
    copy = Path(shutil.copytree(saved[0], tmp_path / "model"))
    (copy / MANIFEST).unlink()
    return copy


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
        MANIFEST,
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
        (
            {"model_type": "bert"},
            "model_type is 'bert'; expected llama, mistral, mixtral",
        ),
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


def test_a_vocabulary_larger_than_the_embedding_is_a_value_error(folder):
    change_tensors(
        folder,
        lambda tensors: tensors.update({"embedding.weight": tensors["embedding.weight"][:270]}),
    )
    change_config(folder, vocab_size=270)
    with pytest.raises(ValueError, match="tokenizer.json has 2.. ids, but the model's vocab_size"):
        load_model(folder)


def test_whole_numbers_as_weights_are_a_value_error(folder):
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {"final_norm.weight": torch.ones_like(tensors["final_norm.weight"]).int()}
        ),
    )
    with pytest.raises(ValueError, match="final_norm.weight must hold floats, got torch.int32"):
        load_model(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layers": 9999}, "holds 2 blocks, but n_layers in config.json is 9999"),
        ({"max_seq_len": 2**30}, r"max_seq_len 1,073,741,824 would need tables"),
        ({"vocab_size": 10**9}, r"embedding.weight must have shape \(1000000000, 16\)"),
        ({"d_model": 2**30}, "config.json: .*larger than any|must have shape"),
    ],
)
def test_sizes_the_weights_do_not_have_take_no_memory(folder, settings, message):
    """Refused before anything of that size is made: this would take gigabytes, or for ever."""
    change_config(folder, **settings)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_is_a_value_error_with_the_remedy(saved, tmp_path, name):
    """One bit of a weight: safetensors itself would not notice."""
    copy = Path(shutil.copytree(saved[0], tmp_path / "model"))
    content = bytearray((copy / name).read_bytes())
    content[-100] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=f"{name}: not the file .*; restore it, or, if you .*delete"
    ):
        load_model(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: not the file that was saved here .no such file"):
        load_model(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sha256": []}', "\x00\xff"])
def test_a_damaged_manifest_is_a_value_error(saved, tmp_path, content):
    copy = Path(shutil.copytree(saved[0], tmp_path / "model"))
    (copy / MANIFEST).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=MANIFEST):
        load_model(copy)


def test_a_file_of_another_folder_is_a_value_error(saved, tmp_path):
    _, model, tokenizer = saved
    torch.manual_seed(1)
    save_model(tmp_path / "other", Transformer(model.config), tokenizer)
    copy = Path(shutil.copytree(saved[0], tmp_path / "model"))
    shutil.copy(tmp_path / "other" / "model.safetensors", copy)
    with pytest.raises(ValueError, match="model.safetensors: not the file that was saved here"):
        load_model(copy)


def test_files_that_are_not_read_may_change(saved, tmp_path):
    """Sampling settings and the chat template are the user's."""
    copy = Path(shutil.copytree(saved[0], tmp_path / "model"))
    (copy / "generation_config.json").write_text("{}")
    (copy / "tokenizer_config.json").unlink()
    load_model(copy)


def test_a_reader_is_not_misled_by_a_writer_that_comes_between(saved, tmp_path, monkeypatch):
    """The trainer exchanges `best` while it is read: the old manifest, the new weights."""
    old = Path(shutil.copytree(saved[0], tmp_path / "model"))
    (old / "model.safetensors").write_bytes(b"new")
    stale = json.loads((saved[0] / MANIFEST).read_text())["sha256"]
    write_manifest(old, list(stale))
    fresh = json.loads((old / MANIFEST).read_text())["sha256"]
    read = iter([stale, fresh, fresh])
    monkeypatch.setattr("pyllm.models.durable.read_manifest", lambda folder: next(read))
    check_manifest(old, ["model.safetensors"])


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
            patch.setattr("pyllm.models.durable.sync", lambda path: None)
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
