"""Stories and chats with a person who types, in this process."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyllm
from pyllm.generate import LanguageModel, SamplingConfig
from pyllm.generate.terminal import Chat, Story, TooLongError, Writer, interact
from pyllm.models import ModelConfig, save_model
from pyllm.tokenizers import Tokenizer, train_bpe

from .small import SMALL, chain_model, make_model

GREEDY = SamplingConfig(greedy=True, max_new_tokens=6)
CHAT = train_bpe(["user\nHello assistant\nA red fox! system\nBe brief."] * 20, 300)
Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> LanguageModel:
    config = ModelConfig(**SMALL | {"vocab_size": tokenizer.vocab_size, "max_seq_len": 64})
    return LanguageModel(make_model(config), tokenizer)


@pytest.fixture
def chatty(tmp_path: Path) -> LanguageModel:
    """Answers every message with "A red fox!", and was tuned for it."""
    ids = CHAT.encode("A red fox!")
    end = CHAT.token_to_id("<|im_end|>")
    chain = chain_model(CHAT, ids, *CHAT.encode("\n"), end, max_seq_len=128)
    save_model(tmp_path / "chat", chain, CHAT)
    (tmp_path / "chat" / "manifest.json").unlink()
    settings = tmp_path / "chat" / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [end]}))
    return pyllm.load(tmp_path / "chat")


def typing(*lines: str | BaseException) -> Callable[[str], str]:
    """What ``input`` would be, for these lines (or what pressing Ctrl-C raises), then Ctrl-D."""
    waiting: Iterator[str | BaseException] = iter(lines)

    def ask(prompt: str) -> str:
        print(prompt, end="")
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return ask


def typing_silently(*lines: str | BaseException) -> Callable[[str], str]:
    ask = typing(*lines)
    return lambda prompt: ask("")


def interrupted(writer: Writer, after: int) -> None:
    """Ctrl-C at this step of the model, once."""
    inner = writer.session.step
    left = [after]

    def step() -> list[tuple[int, int]]:
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        return inner()

    writer.session.step = step  # type: ignore[method-assign]


def test_each_piece_is_shown_before_the_next_token(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    monkeypatch.setattr(
        "builtins.print",
        lambda *values, end="\n", flush=False: happened.append(f"{''.join(values)}{end}{flush}"),
    )
    writer = Writer(model, GREEDY)
    inner = writer.session.step
    monkeypatch.setattr(writer.session, "step", lambda: (happened.append("step"), inner())[1])
    writer.write(model.prompt_ids("Once"), model.stop_ids)
    assert happened[0::2][:6] == ["step"] * 6
    pieces = happened[1:12:2]
    assert all(piece.endswith("True") for piece in pieces)
    assert "".join(pieces).replace("True", "").strip() == writer.text.strip()


def test_a_line_goes_on_with_the_story(model: LanguageModel, capsys: Output) -> None:
    writer = Writer(model, GREEDY, stats=True)
    story = Story(writer)
    story.take("Once there")
    first = writer.text
    timing = writer.session.timing
    typed = model.prompt_ids("Once there")
    assert (timing.cached_tokens, timing.prefill_tokens) == (0, len(typed))
    story.take("a fox")
    timing = writer.session.timing
    joint = "" if first[-1].isspace() else " "
    new = len(model.tokenizer.encode(f"{joint}a fox"))
    assert timing.cached_tokens == len(typed) + 5  # the last of the six was not run yet
    assert timing.prefill_tokens == 1 + new
    told = capsys.readouterr().out.split("\n")[0]
    assert told == f"Once there{first}"


def test_what_was_told_is_what_the_model_sees(model: LanguageModel, capsys: Output) -> None:
    """Also where a stop string ended a turn: the model drew it, but it is no part of the story."""
    config = SamplingConfig(greedy=True, max_new_tokens=4, stop=("e", "x"))
    writer = Writer(model, config)
    story = Story(writer)
    told, ended = "", []
    for line in ("Once", "a fox", " and", "Once", "red."):
        story.take(line)
        told += capsys.readouterr().out[:-1]
        ended.append(writer.ended)
        assert model.tokenizer.decode(writer.ids) == told
    assert True in ended


def test_a_prompt_that_is_cut_says_so_in_one_line(model: LanguageModel, capsys: Output) -> None:
    writer = Writer(model, GREEDY, context=40)
    Story(writer).take("fox " * 60)
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"warning: the prompt has \d+ tokens and the model looks back on 40: only the last 34 of "
        r"them are read, .*; shorten it, or give a larger context \(the model's is 64\)\n",
        err,
    )
    assert writer.ids[0] == model.begin_ids[0] and len(writer.ids) == 40


@pytest.mark.parametrize("line", ["", "a fox"])
def test_after_a_limit_the_story_goes_on(model: LanguageModel, capsys: Output, line: str) -> None:
    writer = Writer(model, GREEDY)
    story = Story(writer)
    story.take("Once")
    assert not writer.ended
    ids = list(writer.ids)
    story.take(line)
    assert writer.ids[: len(ids)] == ids and len(writer.ids) > len(ids)


def test_after_its_end_an_empty_line_begins_another(tokenizer: Tokenizer, capsys: Output) -> None:
    chain = chain_model(tokenizer, tokenizer.encode("Once."), max_seq_len=64)
    model = LanguageModel(chain, tokenizer)
    writer = Writer(model, GREEDY)
    interact(Story(writer), typing("", "", "On", ""))
    assert writer.ended
    out = capsys.readouterr().out
    assert out.count("> Once.\n") == 3 and out.endswith("> \n")
    # A word that is typed is a word of its own.
    assert "> Once.\n> Once.\n>  On" in out


@pytest.mark.parametrize(
    ("line", "fresh", "begins"),
    [
        ("/new", False, ""),
        ("/new ", False, ""),
        ("/new Once", False, "Once"),
        ("Once", True, "Once"),
        ("", True, ""),
        ("/newest", False, None),
        (" /new", False, None),
    ],
)
def test_beginning_anew(
    model: LanguageModel, capsys: Output, line: str, fresh: bool, begins: str | None
) -> None:
    writer = Writer(model, GREEDY)
    story = Story(writer, fresh)
    story.take("A red fox")
    ids = writer.ids
    capsys.readouterr()
    story.take(line)
    if begins is None:
        assert writer.ids[: len(ids)] == ids
        assert line.strip() in capsys.readouterr().out
    else:
        assert capsys.readouterr().out == f"{begins}{model.generate(begins, GREEDY)}\n"


def test_ctrl_c_ends_a_story_and_not_the_program(model: LanguageModel, capsys: Output) -> None:
    long = SamplingConfig(greedy=True, max_new_tokens=10**6)
    writer = Writer(model, long, stats=True)
    interrupted(writer, after=9)
    story = Story(writer)
    with pytest.raises(KeyboardInterrupt):
        story.take("Once")
    ids = list(writer.ids)
    assert len(ids) == len(model.prompt_ids("Once")) + 9
    assert not writer.ended
    out, err = capsys.readouterr()
    assert out == f"Once{writer.text}\n" and err.startswith("9 new tokens; prefill")
    writer.config = GREEDY
    story.take("x")
    assert writer.ids[: len(ids)] == ids and writer.session.timing.cached_tokens == len(ids) - 1


def test_interact(model: LanguageModel, capsys: Output) -> None:
    writer = Writer(model, GREEDY)
    interrupted(writer, after=3)
    interact(Story(writer), typing("Once", KeyboardInterrupt(), "fox", ""))
    out = capsys.readouterr().out
    assert out.startswith("Type how a story begins")
    assert out.count("> ") == 5 and out.endswith("> \n")


def test_what_is_no_text_is_asked_for_again(model: LanguageModel, capsys: Output) -> None:
    writer = Writer(model, GREEDY)
    mistake = UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "bad")
    interact(Story(writer), typing("Once", mistake, "caf\udce9", "fox"))
    out, err = capsys.readouterr()
    assert err == "error: what was typed is not UTF-8 (0xe9); expected UTF-8\n" * 2
    assert out.count("> ") == 5 and " fox" in out.rpartition("> ")[0].rpartition("> ")[2]


def test_ctrl_c_twice_does_not_end_the_program(
    model: LanguageModel, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    presses = [2]

    def pressed_again(*values: object, **more: object) -> None:
        presses[0] -= not values
        if not values and not presses[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", pressed_again)
    interact(
        Story(Writer(model, GREEDY)), typing_silently(KeyboardInterrupt(), KeyboardInterrupt())
    )
    assert presses[0] == -1


def test_a_line_of_punctuation_follows_without_a_space(model: LanguageModel) -> None:
    for line, joint in (
        (", and slept", ""),
        ("...", ""),
        ("!", ""),
        ("'s fox", ""),
        ('" said', ""),
        ('"', ""),
        ('"Hello', " "),
        ("a fox", " "),
        (" ,", ""),
        ("(red)", " "),
        (") red", ""),
        ("\u201d x", ""),
        ("\u201cHi", " "),
        ("3", " "),
    ):
        writer = Writer(model, SamplingConfig(greedy=True, max_new_tokens=1))
        story = Story(writer)
        story.take("The boy went home")
        story._told = story._told.rstrip() + "."  # whatever the model wrote
        ids = list(writer.ids)
        story.take(line)
        assert writer.ids[len(ids) : -1] == model.tokenizer.encode(joint + line), line


def test_a_stop_string_that_is_a_special_token_ends_an_answer(
    chatty: LanguageModel, capsys: Output
) -> None:
    """It is left out of the text, where a string would look for it in vain."""
    config = SamplingConfig(greedy=True, max_new_tokens=12, stop=("<|im_end|>",))
    chatty.stop_ids = frozenset()
    ids = chatty.template.ids([{"role": "user", "content": "Hello"}])
    writer = Writer(chatty, config)
    writer.write(ids, ())
    assert (writer.text, writer.ended) == ("A red fox!", True)
    writer.config = SamplingConfig(greedy=True, max_new_tokens=12)
    writer.write(ids, ())
    assert not writer.ended


def test_what_is_done_afterwards(model: LanguageModel, capsys: Output) -> None:
    given: list[list[int]] = []
    writer = Writer(model, GREEDY, afterwards=given.append)
    writer.write(model.prompt_ids("Once"), model.stop_ids)
    assert given == [writer.ids]
    interrupted(writer, after=1)
    with pytest.raises(KeyboardInterrupt):
        writer.write(model.prompt_ids("Once"), model.stop_ids)
    assert len(given) == 1


def test_a_conversation(chatty: LanguageModel, capsys: Output) -> None:
    writer = Writer(chatty, SamplingConfig(greedy=True), stats=True)
    interact(Chat(writer, "Be brief."), typing("Hello", "", "/new Hello", "Hello", "/new"))
    out, err = capsys.readouterr()
    assert err.count("\n") == 3  # the counts, as the output is no terminal
    assert out.count("A red fox!\n") == 3 and out.count("> ") == 6
    counts = [
        (int(prefill), int(cached))
        for prefill, cached in re.findall(r"prefill (\d+) tokens \((\d+) more were in the", err)
    ]
    system = {"role": "system", "content": "Be brief."}
    hello = {"role": "user", "content": "Hello"}
    answer = {"role": "assistant", "content": "A red fox!"}
    once = len(chatty.template.ids([system, hello]))
    twice = len(chatty.template.ids([system, hello, answer, hello]))
    told = len(CHAT.encode("A red fox!"))
    # /new has the same words as the conversation before, of which all but the last token is kept.
    assert counts == [(once, 0), (1, once - 1), (twice - once - told, once + told)]


def test_a_conversation_that_outgrows_the_context_forgets_its_oldest_messages(
    chatty: LanguageModel, capsys: Output
) -> None:
    config = SamplingConfig(greedy=True, max_new_tokens=20)
    writer = Writer(chatty, config, context=100)
    chat = Chat(writer, "Be brief.")
    for number in range(20):
        # Of different lengths: sometimes it would do to forget the message without its answer.
        chat.take(" fox" * (5 * number % 7) + f"Hello {number}")
        text = CHAT.decode(writer.ids, skip_special=False)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert text.endswith(f"Hello {number}<|im_end|>\n<|im_start|>assistant\nA red fox!")
        assert len(writer.ids) <= 100
    assert "Hello 1<" not in text and "Hello 18<" in text
    _, err = capsys.readouterr()
    assert "(forgotten: the oldest messages, for the context of 100 is full)\n" in err
    with pytest.raises(
        TooLongError,
        match=r"the message is \d+ tokens .* looks back on 100, its answer included; exp",
    ):
        chat.take("x " * 100)
    chat.take("Hello")
    assert "Hello 18\n" in CHAT.decode(writer.ids), "a message that was refused leaves no trace"
    # One that leaves no room for a whole answer is answered all the same.
    chat.take("x" * 60)
    assert writer.text == "A red fox!"


def test_an_answer_ends_where_the_context_does(chatty: LanguageModel, capsys: Output) -> None:
    """It would slide, and the system's message would be gone in silence."""
    system = "Be brief."
    writer = Writer(chatty, SamplingConfig(greedy=True, max_new_tokens=1000), context=60)
    chat = Chat(writer, system)
    for n_letters in (
        5,
        60
        - len(
            chatty.template.ids(
                [{"role": "system", "content": system}, {"role": "user", "content": ""}]
            )
        )
        - 2,
    ):
        capsys.readouterr()
        chat.take("x" * n_letters)
        text = CHAT.decode(writer.ids, skip_special=False)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
        assert len(writer.ids) <= 60
    out, err = capsys.readouterr()
    assert writer.session.timing.new_tokens == 2 and out != "A red fox!\n"
    assert err.endswith("(cut short: the context of 60 is full)\n")


def test_a_sampled_conversation_is_not_computed_again(tmp_path: Path, capsys: Output) -> None:
    """Its answers, encoded from their text, would be other tokens than those in the cache."""
    config = ModelConfig(**SMALL | {"vocab_size": CHAT.vocab_size, "max_seq_len": 256})
    save_model(tmp_path / "random", make_model(config), CHAT)
    model = pyllm.load(tmp_path / "random")
    special = set(CHAT.special_tokens.values())
    otherwise = 0
    for seed in range(8):
        writer = Writer(model, SamplingConfig(seed=seed, temperature=1.5, max_new_tokens=20))
        chat = Chat(writer, "Be brief.")
        for turn in range(3):
            held = len(writer.ids)
            chat.take("Hello")
            timing = writer.session.timing
            total = timing.cached_tokens + timing.prefill_tokens
            if turn:
                assert timing.prefill_tokens <= total - held + 1
            drawn = writer.ids[total:]
            if special & set(drawn):
                break
            otherwise += CHAT.encode(writer.text) != drawn
    assert otherwise > 10


def test_stories_of_one_program_differ_and_those_of_two_do_not(
    model: LanguageModel, capsys: Output
) -> None:
    def told() -> list[str]:
        writer = Writer(model, SamplingConfig(seed=2**63 - 2, temperature=1.5, max_new_tokens=20))
        texts = []
        for _ in range(3):
            Story(writer).take("/new Once")
            texts.append(writer.text)
        return texts

    first = told()
    assert len(set(first)) == 3
    assert first == told()
    assert first[0] == model.generate("Once", seed=2**63 - 2, temperature=1.5, max_new_tokens=20)


def test_a_message_too_long_does_not_end_the_program(chatty: LanguageModel, capsys: Output) -> None:
    writer = Writer(chatty, SamplingConfig(greedy=True))
    interact(Chat(writer), typing("x " * 200, "Hello"))
    out, err = capsys.readouterr()
    assert err.startswith("error: the message is 409 tokens") and err.count("\n") == 1
    assert out.count("A red fox!") == 1


def test_ctrl_c_keeps_the_part_of_an_answer_that_was_told(
    chatty: LanguageModel, capsys: Output
) -> None:
    writer = Writer(chatty, SamplingConfig(greedy=True))
    interrupted(writer, after=3)
    chat = Chat(writer)
    with pytest.raises(KeyboardInterrupt):
        chat.take("Hello")
    part = writer.text
    assert part and part != "A red fox!" and "A red fox!".startswith(part)
    chat.take("Hello")
    assert f"assistant\n{part}<|im_end|>" in CHAT.decode(writer.ids, skip_special=False)


@pytest.mark.parametrize("place", ["_warn", "write", "begin"])
def test_ctrl_c_before_an_answer_leaves_no_second_message(
    chatty: LanguageModel, capsys: Output, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    writer = Writer(chatty, SamplingConfig(greedy=True))
    chat = Chat(writer)
    chat.take("Hello")

    def press(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        owner = {"_warn": chat, "write": writer, "begin": writer.session}[place]
        patch.setattr(owner, place, press)
        chat.take("fox")
    chat.take("x")
    text = CHAT.decode(writer.ids, skip_special=False)
    assert text.count("<|im_start|>user\n") == text.count("<|im_start|>assistant\n")
    assert text.count("A red fox!") == 2, "none is told twice"


def test_a_model_that_was_not_tuned_for_chat_warns_in_one_line(
    model: LanguageModel, tmp_path: Path, capsys: Output
) -> None:
    save_model(tmp_path / "model", model.model, model.tokenizer)
    writer = Writer(pyllm.load(tmp_path / "model"), GREEDY)
    interact(Chat(writer), typing("Hello", "Hello"))
    err = capsys.readouterr().err
    assert err.startswith("warning: this model was not fine-tuned for chat: it goes on writing")
    assert err.count("\n") == 1
    with pytest.raises(ValueError, match="needs the template in a model folder"):
        Chat(Writer(model, GREEDY))
