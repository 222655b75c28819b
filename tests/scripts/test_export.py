"""scripts/export.py: what it writes, where, and what it says of what it cannot write."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyllm.models import Transformer, load_model, save_model

from .conftest import Refusal, script_path


@pytest.fixture
def export(monkeypatch, capsys, tmp_path, fox) -> Callable[..., Path]:
    """Run it in a folder with runs/tale/best in it; the path it says."""
    shutil.copytree(fox, tmp_path / "runs" / "tale" / "best")
    monkeypatch.chdir(tmp_path)

    def run(*flags: object) -> Path:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script_path("export")), run_name="__main__")
        captured = capsys.readouterr()
        assert (stop.value.code, captured.err) == (0, "")
        return tmp_path / captured.out.removesuffix("\n")

    return run


def test_the_newest_run_becomes_a_folder_beside_it(export, fox, tmp_path):
    out = export()
    assert out == tmp_path / "runs" / "tale" / "best-hf"
    model, tokenizer = load_model(out)
    original, its_tokenizer = load_model(fox)
    assert model.config == original.config
    state = original.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert tokenizer.encode("a fox") == its_tokenizer.encode("a fox")
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_gguf_file_with_the_users_own_chat_template(export, tmp_path):
    from gguf import GGUFReader

    settings = tmp_path / "runs" / "tale" / "best" / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "{%- generation -%}x{% endgeneration %}"}))
    out = export("--to", "gguf", "--dtype", "float16", "--out", tmp_path / "new" / "fox.gguf")
    assert out == tmp_path / "new" / "fox.gguf"
    fields = GGUFReader(out).fields
    assert fields["general.file_type"].contents() == 1
    assert fields["general.name"].contents() == "tale"
    assert fields["tokenizer.chat_template"].contents() == "{%- if true -%}x{% endif %}"
    (settings.parent / "chat_template.jinja").write_text("alone")
    out = export("--to", "gguf")
    assert out == tmp_path / "runs" / "tale" / "best.gguf"
    assert GGUFReader(out).fields["tokenizer.chat_template"].contents() == "alone"


def test_what_cannot_be_exported_is_said_in_one_line(refusal: Refusal, fox: Path, tmp_path: Path):
    model, tokenizer = load_model(fox)
    gelu = tmp_path / "gelu"
    save_model(gelu, Transformer(replace(model.config, activation="gelu")), tokenizer)
    line = refusal("export", "--model", gelu, "--out", "x")
    assert line == (
        "error: the model's activation is gelu, and Llama, Mistral and Mixtral have swiglu; it "
        "cannot be exported"
    )
    line = refusal("export", "--model", fox, "--to", "gguf", "--dtype", "q8_0", "--out", "x")
    assert "d_ff is 16, and q8_0 stores rows in blocks of 32; choose another dtype" in line
    for name in ("m.gguf", "new/M.GGUF"):
        line = refusal("export", "--model", fox, "--out", name)
        assert f"out {name} is named as one file, and --to hf writes a folder; give --to" in line
    assert "dtype q8_0 is only for --to gguf" in refusal("export", "--dtype", "q8_0")
    assert f"{gelu}: already there; remove it or" in refusal(
        "export", "--model", fox, "--out", gelu
    )
    (gelu / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default"}]}')
    line = refusal("export", "--model", gelu, "--out", "x")
    assert "chat_template must be one text, got [{'name': 'default'}]" in line
    (gelu / "chat_template.jinja").write_bytes(b"\xff")
    line = refusal("export", "--model", gelu, "--out", "x")
    assert "chat_template.jinja: not UTF-8" in line
    assert not Path("x").exists()


def test_a_folder_of_pickles_is_told_apart_from_an_empty_one(refusal: Refusal, tmp_path: Path):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
    settings = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings | dict.fromkeys(sizes, 8)))
    assert "no model there; expected model.safetensors" in refusal("export", "--model", tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("")
    line = refusal("export", "--model", tmp_path, "--out", "x")
    assert "only pickled weights (pytorch_model.bin), which run whatever code" in line
