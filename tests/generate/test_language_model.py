"""``pyllm.load``: text from one prompt or many, in pieces or whole, and answers in a chat."""

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pyllm
from pyllm.export import write_hugging_face
from pyllm.generate import LanguageModel, SamplingConfig, generate_ids, generate_text
from pyllm.models import ModelConfig, Transformer, save_model
from pyllm.tokenizers import Tokenizer, train_bpe

from .small import SMALL, chain_model, make_model

PROMPTS = ["Once", "", "Once there was a fox, and the fox was red. Once", "fox fox"]
GREEDY = SamplingConfig(greedy=True, max_new_tokens=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A run folder with an untrained model in best/."""
    folder = tmp_path_factory.mktemp("run")
    config = ModelConfig(**SMALL | {"vocab_size": tokenizer.vocab_size, "max_seq_len": 48})
    save_model(folder / "best", make_model(config), tokenizer)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return pyllm.load(folder, device="cpu")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A model folder without a manifest, to change."""
    shutil.copytree(folder / "best", tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    return tmp_path / "model"


def change(folder: Path, name: str, **settings: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_text_whole_and_in_pieces(model: LanguageModel) -> None:
    whole = model.generate("Once", GREEDY)
    assert whole == generate_text(model.model, model.tokenizer, "Once", GREEDY)
    pieces = model.generate("Once", GREEDY, stream=True)
    first = next(pieces)
    assert first and len(first) < len(whole)
    assert first + "".join(pieces) == whole


def test_settings_by_name(model: LanguageModel) -> None:
    by_name = model.generate("Once", max_new_tokens=9, temperature=1.5, seed=4)
    config = SamplingConfig(max_new_tokens=9, temperature=1.5, seed=4)
    assert by_name == model.generate("Once", config)
    assert model.generate("Once", config, seed=5) != by_name
    assert model.generate("Once", config, seed=5) == model.generate("Once", replace(config, seed=5))


@pytest.mark.parametrize("config", [GREEDY, SamplingConfig(seed=3, temperature=1.3)])
def test_a_batch_gives_what_each_prompt_gives_alone(
    model: LanguageModel, config: SamplingConfig
) -> None:
    config = replace(config, max_new_tokens=60)
    texts = model.generate(PROMPTS, config)
    for row, prompt in enumerate(PROMPTS):
        seed = None if config.seed is None else config.seed + row
        assert texts[row] == model.generate(prompt, replace(config, seed=seed))
    joined = [""] * len(PROMPTS)
    order = []
    for row, piece in model.generate(tuple(PROMPTS), config, stream=True):
        assert piece
        joined[row] += piece
        order.append(row)
    assert joined == texts
    assert order[:4] != sorted(order)[:4], "the rows come one after the other"
    assert model.generate([]) == [] and list(model.generate([], stream=True)) == []


def test_stop_strings_end_each_row_for_itself(model: LanguageModel) -> None:
    free = model.generate(PROMPTS, GREEDY)
    stop = free[0][3:5]
    assert stop
    stopped = model.generate(PROMPTS, GREEDY, stop=[stop, "never"])
    assert stopped == [text.partition(stop)[0] for text in free]
    assert model.generate(PROMPTS[0], GREEDY, stop=stop) == free[0].partition(stop)[0]


def test_a_stop_string_that_is_a_special_token_is_one(tokenizer: Tokenizer) -> None:
    pad = tokenizer.pad_id
    chain = chain_model(tokenizer, [*tokenizer.encode("Once."), pad, *tokenizer.encode("fox")])
    one = LanguageModel(chain, tokenizer)
    assert one.generate("", greedy=True) == "Once.fox"
    assert one.generate("", greedy=True, stop="<|pad|>") == "Once."
    assert one.generate("", greedy=True, stop=["fo", "<|pad|>x"]) == "Once."


def test_a_row_that_met_its_stop_string_is_given_no_more_tokens(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = model.generate("Once", GREEDY)
    steps = []
    inner = model.model.hidden
    monkeypatch.setattr(model.model, "hidden", lambda *a: (steps.append(1), inner(*a))[1])
    model.generate("Once", GREEDY)
    assert len(steps) == 20
    steps.clear()
    model.generate("Once", GREEDY, stop=text[:2])
    assert len(steps) < 10


def test_mistakes_are_told_before_a_piece_is_asked_for(model: LanguageModel) -> None:
    mistakes: list[tuple[Any, dict[str, Any], str]] = [
        (
            "x",
            {"top_n": 3},
            "unknown setting 'top_n'; did you mean 'top_[kp]'. Known settings: max",
        ),
        ("x", {"do_sample": True}, "unknown setting 'do_sample'; did you mean"),
        ("x", {"temperature": 0}, "temperature must be above 0"),
        (3, {}, "prompt must be a text or a list of texts, got 3"),
        (None, {}, "prompt must be a text or a list of texts, got None"),
        (["x", 3], {}, "the text must be a str, not int"),
        ("caf\udce9", {}, "a lone surrogate"),
    ]
    for prompt, settings, message in mistakes:
        for stream in (False, True):
            with pytest.raises(ValueError, match=message):
                model.generate(prompt, stream=stream, **settings)
    with pytest.raises(ValueError, match="config must be a SamplingConfig, got 50; .*max_new_toke"):
        model.generate("x", 50)  # type: ignore[call-overload]


def test_special_tokens_in_a_prompt_are_text(model: LanguageModel) -> None:
    ids = model.prompt_ids("<|endoftext|>x")
    assert ids.count(model.tokenizer.end_of_text_id) == 1
    assert model.tokenizer.decode(ids) == "<|endoftext|>x"


def test_what_ends_a_text_comes_from_the_folder(copied: Path, tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_text_id
    assert pyllm.load(copied).stop_ids == {end}
    change(copied, "generation_config.json", eos_token_id=[end, 3])
    assert pyllm.load(copied).stop_ids == {end, 3}
    (copied / "generation_config.json").write_text("{}")
    change(copied, "config.json", eos_token_id=1)
    assert pyllm.load(copied).stop_ids == {1}
    (copied / "generation_config.json").unlink()
    change(copied, "config.json", eos_token_id=None)
    assert pyllm.load(copied).stop_ids == {end}


def test_a_text_of_a_hugging_face_model_begins_as_its_tokenizer_says(
    model: LanguageModel, tmp_path: Path
) -> None:
    theirs, end = tmp_path / "theirs", model.tokenizer.end_of_text_id
    write_hugging_face(theirs, model.model, model.tokenizer)
    exported = pyllm.load(theirs)
    assert exported.begin_ids == model.begin_ids == [end]
    assert exported.generate(PROMPTS, GREEDY) == model.generate(PROMPTS, GREEDY)
    model.tokenizer.save(theirs)  # which puts nothing before a text
    bare = pyllm.load(theirs)
    assert bare.begin_ids == []
    assert bare.prompt_ids("Once") == model.tokenizer.encode("Once")
    assert bare.prompt_ids("") == [end]
    expected = list(generate_ids(model.model, model.tokenizer.encode("Once"), GREEDY))
    assert bare.generate("Once", GREEDY) == model.tokenizer.decode(expected)


def test_settings_of_a_folder_that_are_impossible(copied: Path, tokenizer: Tokenizer) -> None:
    for bad in (-1, tokenizer.vocab_size, "x", 1.5, True, [2, None]):
        change(copied, "generation_config.json", eos_token_id=bad)
        with pytest.raises(
            ValueError, match="generation_config.json: eos_token_id must be a whole"
        ):
            pyllm.load(copied)


def test_how_to_draw_comes_from_the_folder(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pyllm.load(copied).defaults == SamplingConfig()
    asked = {"temperature": 0.3, "top_k": 7, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5}
    change(copied, "generation_config.json", do_sample=True, max_length=20, **asked)
    one = pyllm.load(copied)
    wanted = SamplingConfig(**asked, max_new_tokens=9, seed=1)
    text = one.generate("Once", wanted)
    assert one.generate("Once", max_new_tokens=9, seed=1) == text
    warmer = one.generate("Once", max_new_tokens=9, seed=1, temperature=9.0, top_k=0)
    assert warmer == one.generate("Once", replace(wanted, temperature=9.0, top_k=0))
    usual = SamplingConfig(max_new_tokens=9, seed=1)
    assert one.generate("Once", usual) == pyllm.load(copied).generate("Once", usual) != text
    # Greedy, whatever the others are; but not for who says how to draw.
    change(copied, "generation_config.json", do_sample=False, temperature=0.0, min_p=None)
    one = pyllm.load(copied)
    assert one.defaults == SamplingConfig(greedy=True, repetition_penalty=1.5)
    penalised = replace(GREEDY, repetition_penalty=1.5)
    assert one.generate("Once", max_new_tokens=20) == one.generate("Once", penalised)
    hot = one.generate("Once", temperature=9.0, seed=1, max_new_tokens=20)
    assert hot != one.generate("Once", penalised)
    assert one.generate("Once", penalised) == one.generate(
        "Once", temperature=9.0, greedy=True, max_new_tokens=20
    )
    (copied / "generation_config.json").unlink()
    assert pyllm.load(copied).defaults == SamplingConfig()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("do_sample", "yes", "do_sample must be true or false, got 'yes'"),
        ("temperature", 0, "temperature must be above 0 and finite, got 0"),
        ("top_k", 2.5, "top_k .0 for all. must be a whole number of at least 0, got 2.5"),
        ("top_p", "0.9", "top_p must be above 0 and at most 1, got '0.9'"),
        ("repetition_penalty", -1, "repetition_penalty must be a number from 0.01 to 100"),
    ],
)
def test_a_way_to_draw_that_is_impossible(
    copied: Path, name: str, value: object, message: str
) -> None:
    change(copied, "generation_config.json", **{name: value})
    with pytest.raises(ValueError, match=f"generation_config.json: {message}"):
        pyllm.load(copied)


def test_a_changed_generation_config_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "best", tmp_path / "model")
    change(tmp_path / "model", "generation_config.json", eos_token_id=3)
    with pytest.raises(
        ValueError, match="generation_config.json: not the file that was saved here"
    ):
        pyllm.load(tmp_path / "model")


def test_loading(folder: Path, model: LanguageModel) -> None:
    assert model.folder == folder / "best" and model.config.max_seq_len == 48
    assert not model.model.training
    half = pyllm.load(str(folder), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert half.model.embedding.weight.dtype == torch.bfloat16
    assert repr(half).endswith("best, 74,432 parameters, bfloat16, cpu)"), repr(half)
    assert isinstance(half.generate("Once", max_new_tokens=3), str)
    named = pyllm.load(folder, dtype="float16")
    assert named.model.embedding.weight.dtype == torch.float16
    with pytest.raises(ValueError, match="dtype must be one of float32, .* got 'torch.int16'"):
        pyllm.load(folder, dtype=torch.int16)
    with pytest.raises(ValueError, match="device must be auto, cpu"):
        pyllm.load(folder, device="abacus")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        pyllm.load("nowhere")


def test_loading_with_an_int8_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every session's cache is one: that of generate, and that of a text that goes on."""
    made: list[torch.dtype] = []
    inner = Transformer.new_cache

    def spied(*args: Any, **options: Any) -> Any:
        cache = inner(*args, **options)
        made.append(cache.store.dtype)
        return cache

    monkeypatch.setattr(Transformer, "new_cache", spied)
    for dtype in ("auto", "bfloat16", "int8"):
        loaded = pyllm.load(folder, device="cpu", dtype=dtype, kv_cache_dtype="int8")
        assert (
            loaded.kv_cache_dtype == "int8" and loaded.generate("a", max_new_tokens=3) is not None
        )
        loaded.new_session()
    assert made == [torch.int8] * 6
    with pytest.raises(ValueError, match="kv_cache_dtype must be auto or int8, got 'int4'"):
        pyllm.load(folder, kv_cache_dtype="int4")


def test_a_tokenizer_smaller_or_larger_than_the_model(tokenizer: Tokenizer) -> None:
    config = ModelConfig(**SMALL | {"vocab_size": tokenizer.vocab_size + 40})
    larger = LanguageModel(make_model(config), tokenizer)
    hot = SamplingConfig(temperature=50.0, top_p=1.0, max_new_tokens=100, seed=0)
    assert len(larger.generate("Once", hot)) > 50
    with pytest.raises(ValueError, match="the tokenizer has 2.. tokens and the model 67"):
        LanguageModel(make_model(ModelConfig(**SMALL)), tokenizer)


CHAT = train_bpe(["user\nHello assistant\nA red fox! system\nBe brief."] * 20, 300)
HELLO = [{"role": "user", "content": "Hello"}]


def chat_model(tmp_path: Path, eos: Any = None, end: str = "<|im_end|>") -> LanguageModel:
    """Answers every message with "A red fox!"."""
    ids = CHAT.encode("A red fox!")
    newline = CHAT.encode("\n")
    model = chain_model(CHAT, ids, *newline, CHAT.token_to_id(end), max_seq_len=128)
    save_model(tmp_path / "chat", model, CHAT)
    if eos is not None:
        (tmp_path / "chat" / "manifest.json").unlink()
        change(tmp_path / "chat", "generation_config.json", eos_token_id=eos)
    return pyllm.load(tmp_path / "chat")


def test_an_answer_ends_with_its_turn(tmp_path: Path) -> None:
    model = chat_model(tmp_path, eos=[CHAT.end_of_text_id, CHAT.token_to_id("<|im_end|>")])
    assert model.tuned_for_chat
    assert model.chat(HELLO, greedy=True) == "A red fox!"
    pieces = model.chat(HELLO, greedy=True, stream=True)
    assert isinstance(pieces, Iterator)
    told = list(pieces)
    assert len(told) > 2 and "".join(told) == "A red fox!"
    assert model.chat(HELLO, greedy=True, stop="x") == "A red fo"


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>"])
def test_an_answer_ends_with_the_text_too_and_with_its_turn_in_any_model(
    tmp_path: Path, end: str
) -> None:
    model = chat_model(tmp_path, end=end)
    session = model.new_session()
    with pytest.warns(UserWarning, match="was not fine-tuned for chat"):
        assert model.chat(HELLO, session=session, greedy=True) == "A red fox!"
    assert CHAT.decode(session.ids[0], skip_special=False).endswith("assistant\nA red fox!")


def test_a_conversation_is_not_computed_again(tmp_path: Path) -> None:
    model = chat_model(tmp_path, eos=CHAT.token_to_id("<|im_end|>"))
    session = model.new_session()
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    answer = model.chat(messages, session=session, greedy=True)
    first = len(model.template.ids(messages))
    assert session.timing.prefill_tokens == first
    messages += [{"role": "assistant", "content": answer}, *HELLO]
    assert model.chat(messages, session=session, greedy=True) == answer
    # All of the first turn was there: its prompt, and the answer without the end that was drawn.
    assert session.timing.cached_tokens == first + len(CHAT.encode(answer))
    assert session.timing.prefill_tokens == len(model.template.ids(messages)) - first - len(
        CHAT.encode(answer)
    )


@pytest.fixture
def random_chat(tmp_path: Path) -> LanguageModel:
    """Answers with tokens drawn from nearly all, which its tokenizer would cut otherwise."""
    config = ModelConfig(**SMALL | {"vocab_size": CHAT.vocab_size, "max_seq_len": 256})
    save_model(tmp_path / "random", make_model(config), CHAT)
    (tmp_path / "random" / "manifest.json").unlink()
    change(
        tmp_path / "random", "generation_config.json", eos_token_id=CHAT.token_to_id("<|im_end|>")
    )
    return pyllm.load(tmp_path / "random")


def test_answers_that_were_sampled_are_not_computed_again(random_chat: LanguageModel) -> None:
    """As text they are cut into other tokens; in a conversation they are those that were drawn."""
    otherwise = 0
    special = set(CHAT.special_tokens.values())
    for seed in range(8):
        session = random_chat.new_session()
        messages = [{"role": "system", "content": "Be brief."}, *HELLO]
        for turn in range(3):
            held = len(session.ids[0])
            settings: dict[str, Any] = {"seed": 10 * seed + turn, "max_new_tokens": 20}
            answer = random_chat.chat(messages, session=session, temperature=1.5, **settings)
            timing = session.timing
            total = timing.cached_tokens + timing.prefill_tokens
            if turn:
                assert timing.prefill_tokens <= total - held + 1
            drawn = session.ids[0][total:]
            if special & set(drawn):
                break  # it would be one in the conversation, and its text is taken instead
            otherwise += CHAT.encode(answer) != drawn
            assert session.answers[answer] == drawn
            messages += [{"role": "assistant", "content": answer}, *HELLO]
    assert otherwise > 10


def test_a_special_token_within_an_answer_is_none_in_the_conversation(tmp_path: Path) -> None:
    start, end = CHAT.token_to_id("<|im_start|>"), CHAT.token_to_id("<|im_end|>")
    ids = [*CHAT.encode("A"), start, *CHAT.encode("fox")]
    model = chain_model(CHAT, ids, *CHAT.encode("\n"), end, max_seq_len=128)
    save_model(tmp_path / "chat", model, CHAT)
    one = pyllm.load(tmp_path / "chat")
    session = one.new_session()
    with pytest.warns(UserWarning, match="not fine-tuned"):
        answer = one.chat(HELLO, session=session, greedy=True)
    assert answer == "Afox" and start in session.ids[0][-4:] and not session.answers


def test_an_answer_ends_where_the_context_does(random_chat: LanguageModel) -> None:
    """It would slide, and what the model was told before all messages would be the first to go."""
    session = random_chat.new_session(context=60)
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    ids = random_chat.template.ids(messages)
    drawn = 0
    for seed in range(5):
        settings: dict[str, Any] = {"seed": seed, "max_new_tokens": 1000}
        random_chat.chat(messages, session=session, temperature=0.5, **settings)
        assert session.ids[0][: len(ids)] == ids
        assert len(session.ids[0]) <= 60
        drawn = max(drawn, session.timing.new_tokens)
    assert drawn == 60 - len(ids)
    full = random_chat.new_session(context=len(ids))
    with pytest.raises(
        ValueError, match=f"has {len(ids)} tokens, and the model looks back on {len(ids)}, "
    ):
        random_chat.chat(messages, session=full)


def test_a_prompt_that_is_cut_warns_and_begins_as_every_text(model: LanguageModel) -> None:
    words = "fox " * 60
    n_tokens = len(model.prompt_ids(words))
    with pytest.warns(
        UserWarning,
        match=f"the prompt has {n_tokens} tokens and the model looks back on 48: only the last 28",
    ):
        text = model.generate(words, GREEDY)
    cut = [*model.begin_ids, *model.prompt_ids(words)[-27:]]
    assert text == model.tokenizer.decode(list(generate_ids(model.model, cut, GREEDY)))


def test_a_model_not_tuned_for_chat_says_so(model: LanguageModel) -> None:
    assert not model.tuned_for_chat
    with pytest.warns(UserWarning, match="this model was not fine-tuned for chat") as told:
        model.chat(HELLO, max_new_tokens=2)
    assert len(told) == 1 and told[0].filename == __file__


def test_what_a_chat_refuses(model: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        long = [{"role": "user", "content": "Hello" * 100}]
        with pytest.raises(
            ValueError,
            match="tokens, and the model looks back on 48, its answer included; leave out",
        ):
            model.chat(long, stream=True)
        with pytest.raises(ValueError, match="unknown setting 'role'"):
            model.chat(HELLO, role="user")
        with pytest.raises(ValueError, match="the last message must be the user's"):
            model.chat([], stream=True)
    bare = LanguageModel(model.model, tokenizer)
    with pytest.raises(ValueError, match="needs the template in a model folder; use pyllm.load"):
        bare.chat(HELLO)
    # A vocabulary without the template's tokens, such as GPT-2's.
    plain = train_bpe(["Hello fox"] * 5, 257, ["<|endoftext|>"])
    config = ModelConfig(**SMALL | {"vocab_size": plain.vocab_size})
    save_model(tmp_path / "plain", make_model(config), plain)
    with pytest.raises(ValueError, match="ends an answer with no special token that the tokenizer"):
        pyllm.load(tmp_path / "plain").chat(HELLO)
