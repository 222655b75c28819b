"""What others publish is loaded, prompted and stopped as they say, and exported so, too."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pyllm
from pyllm.evaluate import score_text
from pyllm.export import read_text_settings, write_gguf, write_hugging_face
from pyllm.models import load_model, load_transformer

from .foreign import GREEDY, KINDS, PROMPT, around, bare, change, llama3, make_folder, stopping
from .ggml_forward import GGUF


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def theirs(kind: str, transformers, tokenizer, tmp_path) -> Path:
    content, stops, names = KINDS[kind](tokenizer)
    return make_folder(transformers, tmp_path / "theirs", content, stops, names)


@pytest.fixture
def llama3_folder(transformers, tokenizer, tmp_path) -> Path:
    content, stops, names = llama3(tokenizer)
    return make_folder(transformers, tmp_path / "theirs", content, stops, names)


def written(transformers, folder: Path, n_after: int) -> tuple[list[int], list[int]]:
    """The prompt's tokens, without those put behind it, and the greedy ones, in transformers."""
    ids = transformers.AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    ids = ids[: len(ids) - n_after]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)
    return ids, out[0, len(ids) :].tolist()


def test_it_is_prompted_as_transformers_does(theirs: Path, transformers) -> None:
    model = pyllm.load(theirs, device="cpu")
    ids = transformers.AutoTokenizer.from_pretrained(theirs)(PROMPT).input_ids
    assert ids == model.prompt_ids(PROMPT) + model.tokenizer.suffix_ids
    stops = json.loads((theirs / "config.json").read_text())["eos_token_id"]
    assert model.stop_ids == set(stops if isinstance(stops, list) else [stops])
    assert model.tokenizer.end_of_text_id in model.stop_ids


def test_an_exported_folder_is_prompted_and_stopped_as_before(
    kind: str, theirs: Path, transformers, tmp_path
) -> None:
    first = pyllm.load(theirs, device="cpu")
    # A stop that the greedy text meets, beside those that it has.
    stops = [*sorted(first.stop_ids), stopping(first)]
    change(theirs, "generation_config.json", eos_token_id=stops, temperature=0.3, do_sample=True)
    source = pyllm.load(theirs, device="cpu")
    write_hugging_face(
        tmp_path / "out",
        source.model,
        source.tokenizer,
        texts=read_text_settings(source),
    )
    again = pyllm.load(tmp_path / "out", device="cpu")
    assert again.prompt_ids(PROMPT) == source.prompt_ids(PROMPT)
    assert again.stop_ids == source.stop_ids == set(stops)
    assert again.tokenizer.end_of_text_id == source.tokenizer.end_of_text_id
    assert again.tokenizer.content == source.tokenizer.content
    text = source.generate(PROMPT, GREEDY)
    assert again.generate(PROMPT, GREEDY) == text
    assert text != first.generate(PROMPT, GREEDY), "the stop is not reached"

    n_after = len(source.tokenizer.suffix_ids)
    ids, new = written(transformers, tmp_path / "out", n_after)
    assert (ids, new) == written(transformers, theirs, n_after)
    assert ids == source.prompt_ids(PROMPT) and new[-1] == stops[-1] and len(new) < 60
    before, after = (
        json.loads((folder / "generation_config.json").read_text())
        for folder in (theirs, tmp_path / "out")
    )
    assert after["eos_token_id"][0] == source.tokenizer.end_of_text_id
    told = {"bare": False, "llama3": True}  # of two tokens before a text it would be untrue
    before_names, names = (
        json.loads((folder / "tokenizer_config.json").read_text())
        for folder in (theirs, tmp_path / "out")
    )
    assert names.get("add_bos_token") == told.get(kind)
    assert before_names.items() <= names.items()
    ids_of = ("eos_token_id", "bos_token_id")
    assert all(after[key] == value for key, value in before.items() if key not in ids_of)


def test_the_chat_is_exported_as_it_was(llama3_folder: Path, transformers, tmp_path) -> None:
    source = pyllm.load(llama3_folder, device="cpu")
    write_hugging_face(
        tmp_path / "out", source.model, source.tokenizer, texts=read_text_settings(source)
    )
    messages = [{"role": "user", "content": "Hi <|eot_id|>"}]
    again = pyllm.load(tmp_path / "out", device="cpu")
    assert again.template.ids(messages) == source.template.ids(messages)
    assert source.tuned_for_chat and again.tuned_for_chat
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|begin_of_text|>Hi<|eot_id|>"


def test_a_folder_without_a_chat_template_gets_none(transformers, tokenizer, tmp_path) -> None:
    folder = make_folder(transformers, tmp_path / "theirs", *bare(tokenizer))
    source = pyllm.load(folder, device="cpu")
    texts = read_text_settings(source)
    assert texts.chat_template is None
    write_hugging_face(tmp_path / "out", source.model, source.tokenizer, texts=texts)
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    write_gguf(tmp_path / "m.gguf", source.model, source.tokenizer, texts=texts)
    assert "tokenizer.chat_template" not in GGUF(tmp_path / "m.gguf").fields


@pytest.mark.parametrize("kind", ["bare", "llama3"])
def test_a_gguf_file_is_prompted_and_stopped_as_before(
    kind: str, transformers, tokenizer, tmp_path
) -> None:
    folder = make_folder(transformers, tmp_path / "theirs", *KINDS[kind](tokenizer))
    first = pyllm.load(folder, device="cpu")
    stops = [*sorted(first.stop_ids), stopping(first)]
    change(folder, "generation_config.json", eos_token_id=stops)
    source = pyllm.load(folder, device="cpu")
    texts = read_text_settings(source)
    write_gguf(tmp_path / "m.gguf", source.model, source.tokenizer, texts=texts)
    fields = GGUF(tmp_path / "m.gguf").fields
    names = ("eos", "eot", "eom")
    written = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    assert written[: len(stops)] == list(texts.stop_ids) and set(texts.stop_ids) == set(stops)
    assert fields["tokenizer.ggml.add_bos_token"] == (kind == "llama3")


def test_what_gguf_cannot_say_is_refused(transformers, tokenizer, tmp_path) -> None:
    folder = make_folder(transformers, tmp_path / "theirs", *around(tokenizer))
    source = pyllm.load(folder, device="cpu")
    texts = read_text_settings(source)
    with pytest.raises(ValueError, match=r"begins with 2 tokens \(\[1, 2\]\), .*; --to hf can"):
        write_gguf(tmp_path / "m.gguf", source.model, source.tokenizer, texts=texts)
    change(folder, "generation_config.json", eos_token_id=[0, 5, 6, 7])
    content, _, _ = bare(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    source = pyllm.load(folder, device="cpu")
    with pytest.raises(
        ValueError, match=r"4 tokens end a text \(\[0, 5, 6, 7\]\), .*; --to hf can"
    ):
        write_gguf(
            tmp_path / "m.gguf", source.model, source.tokenizer, texts=read_text_settings(source)
        )
    assert not (tmp_path / "m.gguf").exists()


def test_a_padded_vocabulary_may_hold_the_end(transformers, tokenizer, tmp_path) -> None:
    """Ids beyond the tokenizer's, which the model may draw, end a text; those beyond it do not."""
    content, stop, names = bare(tokenizer)
    padded = tokenizer.vocab_size + 20
    folder = make_folder(
        transformers, tmp_path / "m", content, [padded - 1, stop], names, vocab_size=padded
    )
    model = pyllm.load(folder, device="cpu")
    assert model.stop_ids == {padded - 1, stop} and model.tokenizer.end_of_text_id == stop
    write_hugging_face(
        tmp_path / "out", model.model, model.tokenizer, texts=read_text_settings(model)
    )
    assert pyllm.load(tmp_path / "out", device="cpu").stop_ids == model.stop_ids
    change(folder, "generation_config.json", eos_token_id=[stop, padded])
    with pytest.raises(
        ValueError, match=f"eos_token_id must be a whole number from 0 to {padded - 1}"
    ):
        pyllm.load(folder, device="cpu")


def test_a_byte_order_mark_before_config_json(llama3_folder: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        text = (llama3_folder / name).read_text()
        (llama3_folder / name).write_text(text, encoding="utf-8-sig")
    assert pyllm.load(llama3_folder, device="cpu").stop_ids


REMEDY = "pyllm.models.load_transformer loads the model without it"
ROBERTA = {
    "type": "RobertaProcessing",
    "sep": ["x", 1],
    "cls": ["y", 2],
    "trim_offsets": True,
    "add_prefix_space": False,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Llama 2 and Mixtral: SentencePiece's spaces, put in by a normalizer.
        (
            {"normalizer": {"type": "Prepend", "prepend": "\u2581"}},
            "its normalizer is {'type': 'Prepend'.*, with which texts are lost; expected null",
        ),
        # Mistral 7B v0.3.
        (
            {
                "pre_tokenizer": {
                    "type": "Metaspace",
                    "replacement": "\u2581",
                    "prepend_scheme": "first",
                    "split": False,
                }
            },
            "its pre_tokenizer ends with {'type': 'Metaspace'.*expected ByteLevel without",
        ),
        (
            {"post_processor": {"type": "Sequence", "processors": [ROBERTA]}},
            "its post_processor is 'RobertaProcessing'; expected ByteLevel or TemplateProcessing",
        ),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_with_a_remedy_that_fits(
    llama3_folder: Path, changes: dict[str, Any], message: str
) -> None:
    change(llama3_folder, "tokenizer.json", **changes)
    with pytest.raises(ValueError, match=f"{message}.*; {REMEDY}$") as error:
        load_model(llama3_folder)
    assert "train_tokenizer" not in str(error.value)
    load_transformer(llama3_folder)


def test_no_end_of_text_is_refused(llama3_folder: Path) -> None:
    change(llama3_folder, "config.json", eos_token_id=None)
    change(llama3_folder, "generation_config.json", eos_token_id=None)
    with pytest.raises(ValueError, match=f"no special token <|endoftext|>.*document; {REMEDY}$"):
        load_model(llama3_folder)
    change(llama3_folder, "config.json", eos_token_id=7)  # an ordinary one
    with pytest.raises(ValueError, match=rf"and none with an id in \[7\]; {REMEDY}$"):
        load_model(llama3_folder)


def test_a_mark_that_is_no_token_is_refused(llama3_folder: Path) -> None:
    content = json.loads((llama3_folder / "tokenizer.json").read_text())
    marks = content["post_processor"]["processors"][1]["special_tokens"]
    marks["<|begin_of_text|>"]["ids"] = [len(content["model"]["vocab"]) + 4]
    change(llama3_folder, "tokenizer.json", post_processor=content["post_processor"])
    with pytest.raises(ValueError, match=r"begin_of_text.*, with the ids \[300\]; .* at most 299"):
        load_model(llama3_folder)


def test_an_ordinary_token_that_ends_a_text_is_not_made_a_special_one(
    transformers, tokenizer, tmp_path
) -> None:
    folder = make_folder(transformers, tmp_path / "theirs", tokenizer.content, 261)
    source = pyllm.load(folder, device="cpu")
    write_hugging_face(
        tmp_path / "out", source.model, source.tokenizer, texts=read_text_settings(source)
    )
    assert pyllm.load(tmp_path / "out", device="cpu").stop_ids == {261}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(PROMPT).input_ids == source.prompt_ids(PROMPT)
    assert 261 not in theirs.all_special_ids


def test_a_template_that_drops_the_text_is_refused_in_a_sequence_too(llama3_folder: Path) -> None:
    content = json.loads((llama3_folder / "tokenizer.json").read_text())
    wrong = copy.deepcopy(content["post_processor"])
    wrong["processors"][1]["single"].pop()
    change(llama3_folder, "tokenizer.json", post_processor=wrong)
    with pytest.raises(ValueError, match="has the text 0 times in its template for one text"):
        load_model(llama3_folder)


@pytest.mark.parametrize("count_end", [True, False])
def test_the_loss_is_that_of_transformers(theirs: Path, transformers, count_end: bool) -> None:
    """``labels=ids``: every token but the first, with what stands before a text among them."""
    model = pyllm.load(theirs, device="cpu", dtype="float32")
    begin, end = model.begin_ids, [model.tokenizer.end_of_text_id] * count_end
    score = score_text(model.model, model.tokenizer, [PROMPT], begin_ids=begin, count_end=count_end)
    ids = torch.tensor([[*begin, *model.tokenizer.encode(PROMPT), *end]])
    labels = ids.clone()
    labels[0, : len(begin)] = -100
    other = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
    with torch.no_grad():
        loss = other(ids, labels=labels).loss.item()
    assert score.loss == pytest.approx(loss, rel=1e-5)


FOX = {"content": "fox", "special": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"320": FOX}},
            r"'fox' \(id 320\) is not in tokenizer.json, so that texts would",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"17": FOX | {"content": "<|im_end|>"}}},
            r"'<.im_end.>' \(id 17\) has the id 3 in tokenizer.json",
        ),
        ("tokenizer_config.json", {"additional_special_tokens": ["<a>"]}, "'<a>' is not in tok"),
        ("tokenizer_config.json", {"additional_special_tokens": [FOX]}, "'fox' is not in tok"),
        ("tokenizer_config.json", {"extra_special_tokens": {"image": "<i>"}}, "'<i>' is not in"),
        ("tokenizer_config.json", {"bos_token": "<s>"}, "'<s>' is not in tokenizer.json"),
        ("special_tokens_map.json", {"pad_token": FOX}, "'fox' is not in tokenizer.json"),
        ("added_tokens.json", {"fox": 320}, r"'fox' \(id 320\) is not in tokenizer.json"),
        (
            "tokenizer_config.json",
            {"add_prefix_space": True},
            "add_prefix_space is true, and",
        ),
    ],
)
def test_tokens_outside_of_tokenizer_json_are_refused(
    transformers, tokenizer, tmp_path, name: str, settings: dict[str, Any], message: str
) -> None:
    content, stops, names = bare(tokenizer)
    folder = make_folder(transformers, tmp_path, content, stops, names, vocab_size=330)
    load_model(folder)
    (folder / name).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{name}: its .*{message}.*; {REMEDY}$"):
        load_model(folder)
    load_transformer(folder)


def test_what_a_saved_tokenizer_says_beside_tokenizer_json_is_let_in(
    llama3_folder: Path, transformers
) -> None:
    """As save_pretrained of transformers 5 writes it, and as 4 does."""
    before = load_model(llama3_folder)[1].content
    transformers.AutoTokenizer.from_pretrained(llama3_folder).save_pretrained(llama3_folder)
    added = {str(token["id"]): token for token in before["added_tokens"]}
    change(llama3_folder, "tokenizer_config.json", added_tokens_decoder=added)
    tokens = {token["content"]: token["id"] for token in before["added_tokens"]}
    (llama3_folder / "added_tokens.json").write_text(json.dumps(tokens))
    (llama3_folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": before["added_tokens"][0], "eos_token": "<|eot_id|>"})
    )
    assert load_model(llama3_folder)[1].content["model"] == before["model"]


@pytest.mark.parametrize("whole", [True, False], ids=["beside a model", "alone"])
def test_an_adapter_is_refused(llama3_folder: Path, whole: bool) -> None:
    (llama3_folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not whole:
        for name in ("model.safetensors", "config.json"):
            (llama3_folder / name).unlink()
    for load in (pyllm.load, load_model, load_transformer):
        with pytest.raises(ValueError, match="adapter_config.json: .*LoRA.*; merge it first"):
            load(llama3_folder)
