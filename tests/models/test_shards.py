"""Weights of a Hugging Face folder: read from one file or several, refused where they are wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyllm.models import Transformer, load_model, load_transformer
from pyllm.models.hugging_face import read_settings, tensor_parts
from pyllm.models.shards import INDEX, WEIGHTS, split_rows
from pyllm.tokenizers import train_bpe

SETTINGS = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "num_local_experts": 3,
}
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
DOWN = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(read_settings(SETTINGS))


@pytest.fixture
def folder(model: Transformer, tmp_path: Path) -> Path:
    """As transformers writes it, without a tokenizer."""
    state = model.state_dict()
    tensors = {
        part.name: rows.clone()
        for name, parts in tensor_parts(model.config)
        for part, rows in zip(parts, split_rows(state[name], parts), strict=True)
    }
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    return tmp_path


def split(folder: Path) -> None:
    """Into three files and an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name in names if weight_map[name] == file}, folder / file
        )
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object], file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)


def change_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def same(a: Transformer, b: Transformer) -> bool:
    state = b.state_dict()
    return all(torch.equal(value, state[name]) for name, value in a.state_dict().items())


def test_one_file_and_several(model: Transformer, folder: Path) -> None:
    assert same(load_transformer(folder), model)
    split(folder)
    loaded = load_transformer(folder)
    assert same(loaded, model) and loaded.config == model.config and not loaded.training


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(W1), rf"missing tensors \['{W1}'\], unknown tensors \[\]"),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}
            ),
            r"missing tensors \[\], unknown tensors \['model.layers.0.self_attn.q_proj.bias'\]",
        ),
        (
            lambda tensors: tensors.update({DOWN: tensors[DOWN].t().contiguous()}),
            rf"{DOWN} must have shape \(16, 12\), got \(12, 16\)",
        ),
        (
            lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.float8_e4m3fn)}),
            f"{DOWN} must hold F32, BF16, F16, F64, got F8_E4M3; quantised weights cannot be",
        ),
        (
            lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)}),
            f"{DOWN} must hold F32, BF16, F16, F64, got I8; quantised",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name],
            "holds 3 tensors, too few for 2 layers of 3 experts",
        ),
    ],
)
def test_wrong_tensors_are_value_errors(folder: Path, edit, message: str) -> None:
    change(folder, edit)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: {message}"):
        load_transformer(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_more_layers_or_experts_than_there_are_take_no_time(folder: Path, key: str) -> None:
    (folder / "config.json").write_text(json.dumps(SETTINGS | {key: 10_000}))
    with pytest.raises(ValueError, match="tensors, too few for 10000 layers|of 10000 experts"):
        load_transformer(folder)


def test_a_context_too_long_for_its_tables_is_a_value_error(folder: Path) -> None:
    settings = SETTINGS | {"max_position_embeddings": 2**30}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="config.json: max_seq_len 1,073,741,824 would need"):
        load_transformer(folder)


def test_tied_embeddings_may_be_written_twice_if_they_are_the_same(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(SETTINGS | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="lm_head.weight is not model.embed_tokens.weight, as tie"):
        load_transformer(folder)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    assert load_transformer(folder).output is None
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].half()}))
    with pytest.raises(ValueError, match="lm_head.weight is not model.embed_tokens.weight, as tie"):
        load_transformer(folder)
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    load_transformer(folder)
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(ValueError, match=r"missing tensors \['lm_head.weight'\]"):
        load_transformer(folder)


def test_frequencies_that_old_files_keep_are_passed_over(model: Transformer, folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, lambda tensors: tensors.update({name: torch.ones(2)}))
    assert same(load_transformer(folder), model)


@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_a_file_cut_short_is_a_value_error(folder: Path, size: int) -> None:
    split(folder)
    shard = folder / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(ValueError, match="model-1.safetensors: damaged or not a safetensors file"):
        load_transformer(folder)


def test_a_missing_shard_is_a_value_error(folder: Path) -> None:
    split(folder)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match="model-2.safetensors: no such file; .*index.json says"):
        load_transformer(folder)


def test_an_index_that_is_not_of_its_files_is_a_value_error(folder: Path) -> None:
    split(folder)
    file = json.loads((folder / INDEX).read_text())["weight_map"][W1]
    other = "model-1.safetensors" if file != "model-1.safetensors" else "model-0.safetensors"
    change_index(folder, **{W1: other})
    with pytest.raises(ValueError, match=f"{other}: no tensor {W1}, which .*index.json says"):
        load_transformer(folder)
    change_index(folder, **{W1: file})
    change(folder, lambda tensors: tensors.update({W1: torch.zeros(12, 16)}), other)
    with pytest.raises(ValueError, match=f"{W1} is in another file of .*, too"):
        load_transformer(folder)


@pytest.mark.parametrize("name", ["../model-0.safetensors", "/etc/passwd", 3, None, ["x"], ""])
def test_an_index_cannot_leave_its_folder(folder: Path, name: object) -> None:
    split(folder)
    shutil.copy(folder / "model-0.safetensors", folder.parent)
    change_index(folder, **{W1: name})
    with pytest.raises(ValueError, match=r"index.json: .* is not the name of a file in"):
        load_transformer(folder)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[", "\x00"])
def test_a_damaged_index_is_a_value_error(folder: Path, text: str) -> None:
    split(folder)
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match="index.json: (damaged: no object|not a JSON)"):
        load_transformer(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"]
)
def test_pickled_weights_are_never_opened(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    message = f"only pickled weights .{name}., which run whatever code is in them when read"
    with pytest.raises(ValueError, match=message):
        load_transformer(folder)


def test_no_weights_at_all_are_a_value_error(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="model.safetensors: no such file, and no model"):
        load_transformer(folder)


def test_a_tokenizer_that_loses_text_is_refused_only_where_it_is_needed(
    model: Transformer, folder: Path
) -> None:
    """The SentencePiece vocabularies of Llama 2 and Mixtral, for example."""
    with pytest.raises(ValueError, match=r"tokenizer.json: no .*; pyllm.models.load_transformer"):
        load_model(folder)
    content = train_bpe(["Once there was a fox. "] * 20, 280).content
    content["normalizer"] = {"type": "Prepend", "prepend": "_"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="texts are lost.*; pyllm.models.load_transformer loads"):
        load_model(folder)
    assert same(load_transformer(folder), model)


def test_a_tokenizer_with_more_tokens_than_the_model_is_a_value_error(folder: Path) -> None:
    train_bpe([bin(n).replace("0", "a").replace("1", "b") for n in range(2000)], 310).save(folder)
    with pytest.raises(ValueError, match="tokenizer.json has 310 ids, but the model's vocab_size"):
        load_model(folder)
    train_bpe(["Once there was a fox. "] * 20, 280).save(folder)
    assert load_model(folder)[1].vocab_size < 300


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_numbers_that_are_none_are_refused(folder: Path, number: float, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors[W1][3, 5] = number
    save_file(tensors, folder / WEIGHTS)
    for wanted in (None, torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"{W1} holds a number that is NaN or infinite; the"):
            load_transformer(folder, dtype=wanted)


def test_numbers_that_do_not_fit_the_dtype_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[DOWN][0, 0] = 70_000
    save_file(tensors, folder / WEIGHTS)
    load_transformer(folder)
    with pytest.raises(ValueError, match=f"{DOWN} holds a number beyond the range of float16; lo"):
        load_transformer(folder, dtype=torch.float16)
