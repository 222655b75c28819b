"""A session computes only what is new, and its rows write what each would alone."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyllm.generate import SamplingConfig, Session, generate_ids, session
from pyllm.models import ModelConfig, Transformer

from .claimed import claimed
from .small import SMALL, make_model

CONFIG = ModelConfig(**SMALL)
GREEDY = SamplingConfig(greedy=True, max_new_tokens=8)
RAGGED = [[3], [5, 1, 4, 1, 5, 9, 2, 6], [11, 12], [7] * 20, [60, 61, 62]]


ROLLING = replace(CONFIG, window=5, attention_sinks=2)


@pytest.fixture(scope="module", params=[CONFIG, ROLLING], ids=["contiguous", "rolling"])
def model(request: pytest.FixtureRequest) -> Transformer:
    """Whose cache rolls has 22 slots for its 32 positions."""
    return make_model(request.param)


def write(
    one: Session, prompts: list[list[int]], config: SamplingConfig, stops: Any = ()
) -> list[list[int]]:
    """The tokens that each row added."""
    added: list[list[int]] = [[] for _ in prompts]
    one.begin(prompts, config, stops)
    while one.running:
        for row, token in one.step():
            added[row].append(token)
    return added


def alone(model: Transformer, prompt: list[int], config: SamplingConfig) -> list[int]:
    return list(generate_ids(model, prompt, config))


class Spy:
    """Records how many tokens of each row the model is given."""

    def __init__(self, model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[list[int]] = []
        self.projected: list[int] = []
        """Rows whose logits the model gave."""
        inner = session.next_logits

        def spied(model: Any, ids_BT: Any, cache: Any, counts: Any, native: Any) -> Any:
            self.runs.append([ids_BT.shape[1]] * ids_BT.shape[0] if counts is None else counts)
            logits_RV = inner(model, ids_BT, cache, counts, native)
            self.projected.append(len(logits_RV))
            return logits_RV

        monkeypatch.setattr(session, "next_logits", spied)


def test_a_text_that_goes_on_is_not_computed_again(model, monkeypatch):
    spy = Spy(model, monkeypatch)
    one = Session(model)
    first = write(one, [[3, 1, 4]], GREEDY)[0]
    assert spy.runs == [[3], *[[1]] * 7]
    assert first == alone(model, [3, 1, 4], GREEDY)

    spy.runs.clear()
    prompt = [3, 1, 4, *first, 9, 9]  # the last token drawn was never given to the model
    second = write(one, [prompt], GREEDY)[0]
    assert spy.runs == [[3], *[[1]] * 7]
    assert second == alone(model, prompt, GREEDY)
    assert one.ids == [[*prompt, *second]]
    assert (one.timing.cached_tokens, one.timing.prefill_tokens) == (10, 3)
    assert (one.timing.decode_tokens, one.timing.new_tokens) == (7, 8)


@pytest.mark.parametrize("shared", [0, 1, 5, 9, 10])
def test_only_the_beginning_that_both_share_is_kept(model, monkeypatch, shared):
    prompt = list(range(10, 20))
    one = Session(model)
    write(one, [prompt], GREEDY)
    spy = Spy(model, monkeypatch)
    other = prompt[:shared] + [50] * 4
    assert write(one, [other], GREEDY)[0] == alone(model, other, GREEDY)
    assert spy.runs[0] == [4]
    assert one.timing.cached_tokens == shared


@pytest.mark.parametrize("n_prompt", [20, 31])
def test_a_rolling_cache_goes_back_as_far_as_it_can(monkeypatch, n_prompt):
    """It holds the last 5 + 15 positions and the sink: a little change at the end is cheap, and a
    text that turns off earlier is run again from its beginning."""
    model = make_model(replace(CONFIG, window=5, attention_sinks=1))
    short = replace(GREEDY, max_new_tokens=1)
    prompt = list(range(10, 10 + n_prompt))
    for shared, kept in ((n_prompt - 3, n_prompt - 3), (7, 0 if n_prompt == 31 else 7)):
        one = Session(model)
        assert one.cache.rolling
        write(one, [prompt], short)
        spy = Spy(model, monkeypatch)
        other = prompt[:shared] + [50] * 3
        assert write(one, [other], GREEDY)[0] == alone(model, other, GREEDY)
        assert spy.runs[0] == [len(other) - kept]
        assert one.timing.cached_tokens == kept


def test_the_same_prompt_again_runs_its_last_token(model, monkeypatch):
    one = Session(model)
    first = write(one, [[3, 1, 4]], GREEDY)
    spy = Spy(model, monkeypatch)
    assert write(one, [[3, 1, 4]], GREEDY) == first
    assert spy.runs[0] == [1]
    assert (one.timing.prefill_tokens, one.timing.decode_tokens) == (1, 7)
    spy.runs.clear()
    assert write(one, [[3]], GREEDY)[0] == alone(model, [3], GREEDY)
    assert spy.runs[0] == [1]


def test_many_turns_past_a_full_context(model, monkeypatch):
    """Each turn goes on where the last one ended; when the context slides, only the kept half and
    what is new is run, and the text is as if it had been computed from these tokens alone."""
    one = Session(model)
    ids = [5]
    spy = Spy(model, monkeypatch)
    for turn in range(12):
        prompt = [*ids, 20 + turn, 21 + turn]
        before = len(ids)
        added = write(one, [prompt], GREEDY)[0]
        seen = list(prompt)
        for token in added:
            if len(seen) > 32:
                seen = seen[-16:]
            assert token == int(model(torch.tensor([seen])).logits[0, -1].argmax())
            seen.append(token)
        ids = one.ids[0]
        assert ids == seen
        slid = len(ids) < before + 10
        assert max(max(run) for run in spy.runs) == (16 if slid else 3 if turn else 3)
        spy.runs.clear()


@pytest.mark.parametrize("name", ["greedy", "sampled", "penalised"])
def test_rows_write_what_each_would_alone(model, name):
    config = {
        "greedy": replace(GREEDY, max_new_tokens=40),
        "sampled": SamplingConfig(seed=5, temperature=1.5, max_new_tokens=40),
        "penalised": SamplingConfig(
            seed=9, temperature=1.5, repetition_penalty=1.8, min_p=0.05, max_new_tokens=40
        ),
    }[name]
    together = write(Session(model, len(RAGGED)), RAGGED, config)
    for row, prompt in enumerate(RAGGED):
        seed = None if config.seed is None else config.seed + row
        assert together[row] == alone(model, prompt, replace(config, seed=seed))
        assert len(together[row]) == 40
    assert len({tuple(row) for row in together}) == len(RAGGED)


def test_equal_prompts_with_a_seed_each_give_different_texts(model):
    config = SamplingConfig(seed=5, temperature=1.5, max_new_tokens=12)
    together = write(Session(model, 3), [[4, 4]] * 3, config)
    assert len({tuple(row) for row in together}) == 3
    unseeded = replace(config, seed=None)
    assert len({tuple(row) for row in write(Session(model, 3), [[4, 4]] * 3, unseeded)}) == 3


def test_a_row_that_ends_leaves_the_others_alone(model, monkeypatch):
    long = replace(GREEDY, max_new_tokens=12)
    free = write(Session(model, 3), RAGGED[:3], long)
    stop = free[1][4]
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    assert len({len(row) for row in cut}) > 1
    spy = Spy(model, monkeypatch)
    one = Session(model, 3)
    assert write(one, RAGGED[:3], long, {stop}) == cut
    assert one.ids == [prompt + row for prompt, row in zip(RAGGED, cut, strict=False)]
    # A row that has ended is given no more tokens.
    for row, tokens in enumerate(cut):
        steps = len(tokens) + (len(tokens) < 12)
        assert [run[row] for run in spy.runs][steps:] == [0] * (len(spy.runs) - steps)
    # Nor is it projected to the vocabulary.
    assert spy.projected == [sum(count > 0 for count in run) for run in spy.runs]
    assert spy.projected[0] == 3 > spy.projected[-1]


def test_end_takes_a_row_out(model):
    one = Session(model, 2)
    one.begin([[3], [4]], GREEDY)
    assert [row for row, _ in one.step()] == [0, 1] and one.running == [0, 1]
    one.end(0)
    assert [row for row, _ in one.step()] == [1]
    one.end(1)
    one.end(1)
    assert one.running == []


def test_rows_go_on_each_from_its_own_cache(model, monkeypatch):
    one = Session(model, 3)
    first = write(one, RAGGED[:3], GREEDY)
    spy = Spy(model, monkeypatch)
    prompts = [
        [*RAGGED[0], *first[0], 8],  # goes on
        [*RAGGED[1][:3], 33, 34],  # turns off after three tokens
        [40, 41, 42, 43],  # another
    ]
    second = write(one, prompts, GREEDY)
    assert spy.runs[0] == [2, 2, 4]
    for prompt, added in zip(prompts, second, strict=True):
        assert added == alone(model, prompt, GREEDY)


@pytest.mark.parametrize("back", [0, 3, 12, 20, 40])
def test_a_rolling_cache_far_into_a_text_goes_back_or_begins_anew(monkeypatch, back):
    """Beyond that, the text is run again: what was written over is never read."""
    model = make_model(replace(ROLLING, max_seq_len=128))
    one = Session(model)
    write(one, [[3, 1, 4]], replace(GREEDY, max_new_tokens=60))
    assert one.cache.rolling
    spy = Spy(model, monkeypatch)
    prompt = [*one.ids[0][: 62 - back], 9, 9]
    assert write(one, [prompt], GREEDY)[0] == alone(model, prompt, GREEDY)
    assert one.timing.cached_tokens in ((0,) if back >= 20 else (62 - back,))
    assert spy.runs[0] == [len(prompt) - one.timing.cached_tokens]


class Interrupting:
    """Raises KeyboardInterrupt at the n-th call of a method of the model or the cache."""

    def __init__(self, inner: Any, after: int) -> None:
        self.inner, self.left = inner, after

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner(*arguments, **more)


@pytest.mark.parametrize("after", [0, 1, 4, 13, 30])
@pytest.mark.parametrize("place", ["prompt", "block", "draw", "truncate"])
def test_an_interruption_anywhere_leaves_a_session_that_goes_on(model, monkeypatch, after, place):
    one = Session(model)
    write(one, [[3, 1, 4]], GREEDY)
    long = replace(GREEDY, max_new_tokens=40)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if place in ("prompt", "block"):
            middle = model.blocks[1]
            patch.setattr(middle, "forward", Interrupting(middle.forward, after))
        elif place == "draw":
            patch.setattr(session, "sample_token", Interrupting(session.sample_token, after))
        else:
            patch.setattr(one.cache, "truncate", Interrupting(one.cache.truncate, after % 2))
        new = {"prompt": [9] * 20, "truncate": [3, 1, 9, 9, 9, 9]}.get(place, [*one.ids[0], 9])
        write(one, [new], long)
        raise KeyboardInterrupt  # it was over before
    ids = one.ids[0]
    # Draws of a hot model differ where any number of it does.
    hot = SamplingConfig(seed=1, temperature=3.0, top_p=1.0, max_new_tokens=15)
    longer = [*ids, 8]
    slid = longer if len(longer) <= 32 else longer[-16:]
    assert write(one, [longer], hot)[0] == alone(model, slid, hot)
    assert write(one, [[3, 1, 5]], hot)[0] == alone(model, [3, 1, 5], hot)


def test_the_penalty_is_for_all_tokens_of_the_text(model):
    """Of the prompt and of the continuation, also of what a full context has forgotten."""
    config = replace(GREEDY, repetition_penalty=3.0, max_new_tokens=40)
    prompt = [60, 3, 17]
    seen = list(prompt)
    told = set(prompt)
    for token in write(Session(model), [prompt], config)[0]:
        if len(seen) > 32:
            seen = seen[-16:]
        logits = model(torch.tensor([seen])).logits[0, -1].tolist()
        assert token == claimed(logits, config, told).index(1.0)
        seen.append(token)
        told.add(token)
    assert len(told) > 20
    free = write(Session(model), [prompt], replace(config, repetition_penalty=1.0))[0]
    assert len({*prompt, *free}) < len(told)


def test_the_penalty_is_not_for_what_begins_and_ends_a_text(model):
    """End-of-text does both: marked as seen it would become unlikely, and no text would end."""
    config = replace(GREEDY, repetition_penalty=3.0, max_new_tokens=1)
    for begin, stops, prompt, told in (
        ([5], {5}, [5, 60, 3], {60, 3}),
        ([5], {9}, [5, 60, 3], {60, 3}),
        ([5], {9}, [5, 60, 5], {60, 5}),  # within the text it is a word as any other
        ([], {9}, [5, 60, 9, 3], {5, 60, 3}),  # such as the end of an earlier answer
    ):
        one = Session(model, begin_ids=begin)
        one.begin([prompt], config, stops)
        assert one._seen_BV is not None
        assert set(one._seen_BV[0].nonzero().flatten().tolist()) == told
        logits = model(torch.tensor([prompt])).logits[0, -1].tolist()
        drawn = dict(one.step()).get(0)
        best = claimed(logits, config, told).index(1.0)
        assert drawn == (None if best in stops else best)


def test_a_context_smaller_than_the_models(model, monkeypatch):
    one = Session(model, context=8)
    spy = Spy(model, monkeypatch)
    prompt = [1, 2, 3, 4, 5]
    seen = list(prompt)
    for token in write(one, [prompt], replace(GREEDY, max_new_tokens=20))[0]:
        if len(seen) > 8:
            seen = seen[-4:]
        assert token == int(model(torch.tensor([seen])).logits[0, -1].argmax())
        seen.append(token)
    assert spy.runs[:5] == [[5], [1], [1], [1], [4]]
    assert Session(model, context=10**6).context == Session(model).context == 32


@pytest.mark.parametrize("begin", [[1], [1, 2]])
def test_what_every_text_begins_with_stays_when_a_context_slides(model, begin):
    one = Session(model, 2, context=12, begin_ids=begin)
    prompts = [[*begin, 30, 31], [40, 41, 42]]  # the second one begins with something else
    seen = [list(prompt) for prompt in prompts]
    one.begin(prompts, replace(GREEDY, max_new_tokens=30))
    for _ in range(30):
        for row, ids in enumerate(seen):
            if len(ids) > 12:
                kept = begin if row == 0 else []
                seen[row] = [*kept, *ids[-6 + len(kept) :]]
        for row, token in one.step():
            assert token == int(model(torch.tensor([seen[row]])).logits[0, -1].argmax())
            seen[row].append(token)
    assert one.ids == seen


@pytest.mark.parametrize(("max_new_tokens", "kept"), [(4, 28), (16, 16), (1000, 16)])
def test_a_prompt_that_is_cut_leaves_room_and_says_so(model, monkeypatch, max_new_tokens, kept):
    prompt = [1, *range(10, 60)]
    spy = Spy(model, monkeypatch)
    one = Session(model, 2, begin_ids=[1])
    expected = (
        rf"the prompt has 51 tokens and the model looks back on 32: only the last {kept} of them "
        r"are read, with room left for what is written; shorten it$"
    )
    config = replace(GREEDY, max_new_tokens=max_new_tokens)
    with pytest.warns(UserWarning, match=expected) as told:
        one.begin([prompt, [1, 7]], config)
    assert len(told) == 1
    one.step()
    assert spy.runs == [[kept, 2]]
    assert one.ids[0][:-1] == [1, *prompt[-kept + 1 :]]
    # The penalty is for the whole of it.
    with pytest.warns(UserWarning, match=expected):
        one.begin([prompt, [1, 7]], replace(config, repetition_penalty=1.5))
    assert one._seen_BV is not None
    assert one._seen_BV[0].nonzero().flatten().tolist() == [*range(10, 60)]
    with pytest.warns(UserWarning, match=r"or give a larger context \(the model's is 32\)$"):
        Session(model, context=8).begin([prompt], config)


def test_a_long_text_that_goes_on_slides_without_a_warning(model):
    """What is lost then was told before, as when a text outgrows the context while it is written;
    a new piece of its own that has no room is another matter."""
    one = Session(model, begin_ids=[1])
    write(one, [[1, 3, 4]], replace(GREEDY, max_new_tokens=25))
    held = list(one.ids[0])
    one.begin([[*held, *range(40, 50)]], GREEDY)
    assert one.ids == [[1, *held[-5:], *range(40, 50)]]
    one.begin([[*one.ids[0], *range(20, 38)]], GREEDY)
    assert one.ids == [[1, *range(45, 50), *range(20, 38)]], "more than a half, and all of it new"
    with pytest.warns(UserWarning, match="the prompt has 54 tokens .* only the last 24 of them"):
        one.begin([[*one.ids[0], *range(10, 40)]], GREEDY)


def test_the_usual_context_of_a_model_with_a_large_one(monkeypatch):
    monkeypatch.setattr(session, "USUAL_CONTEXT", 20)
    assert Session(make_model(CONFIG)).context == 20
    assert Session(make_model(ROLLING)).context == 32, "its memory does not depend on it"


def test_words_the_tokenizer_has_not_are_never_drawn(model):
    one = Session(model, n_words=10)
    hot = SamplingConfig(temperature=50.0, top_p=1.0, max_new_tokens=200, repetition_penalty=1.1)
    added = write(one, [[66, 3]], hot)[0]
    assert set(added) == set(range(10))


def test_times_are_counted_apart(model, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(session, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    one = Session(model, 2)
    write(one, [[3, 1, 4], [5]], GREEDY)
    timing = one.timing
    assert (timing.prefill_tokens, timing.prefill_seconds) == (4, 1)
    assert (timing.decode_tokens, timing.decode_seconds) == (14, 7)
    assert str(timing) == (
        "16 new tokens; prefill 4 tokens (0 more were in the cache) in 1.000 s, 4.0 tokens/s; "
        "decode 14 tokens in 7.000 s, 2.0 tokens/s"
    )
    # A context that slides is a prefill again: the second row's at once, then the first one's.
    one = Session(model, 2)
    write(one, [[3] * 30, [5] * 32], GREEDY)
    assert one.timing.prefill_tokens == (30 + 32) + (1 + 16) + (16 + 1)
    assert one.timing.prefill_seconds == 3
    assert str(session.Timing()).count("0.0 tokens/s") == 2


def test_impossible_sessions_are_value_errors(model):
    with pytest.raises(ValueError, match="context must be a whole number of at least 1, got 0"):
        Session(model, context=0)
    with pytest.raises(ValueError, match="batch must be .* got 0"):
        Session(model, 0)
    with pytest.raises(ValueError, match="expected 2 prompts, one a row, got 1"):
        Session(model, 2).begin([[1]], GREEDY)
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        Session(model).begin([[]], GREEDY)
    with pytest.raises(ValueError, match="prompt: token 67 is not in the model's vocabulary"):
        Session(model).begin([[67]], GREEDY)


def test_a_prompt_that_is_refused_leaves_the_session_as_it_was(model):
    one = Session(model)
    write(one, [[3, 1, 4]], GREEDY)
    ids = list(one.ids[0])
    with pytest.raises(ValueError, match="vocabulary"):
        one.begin([[3, 1, 99]], GREEDY)
    assert one.ids == [ids]
    assert write(one, [[*ids, 8]], GREEDY)[0] == alone(model, [*ids, 8], GREEDY)
    assert one.timing.cached_tokens == len(ids) - 1


def test_an_int8_cache_writes_from_integers(model):
    """In a quarter of the memory and a scale; on and on, as it would in one go."""
    one, plain = Session(model, kv_cache_dtype="int8"), Session(model)
    first = write(one, [[3, 1, 4]], GREEDY)[0]
    assert one.cache.store.dtype == torch.int8 and plain.cache.scales is None
    head = model.config.head_dim
    assert one.cache.nbytes * 4 * head == plain.cache.nbytes * (head + 4)
    again = write(one, [[3, 1, 4, *first[:4]]], GREEDY)[0]
    assert again[:4] == first[4:]
    options = {"kv_cache_dtype": "int8"}
    assert again == list(generate_ids(model, [3, 1, 4, *first[:4]], GREEDY, **options))


@pytest.mark.parametrize("name", ["int4", "float8", "", None, torch.int8])
def test_a_cache_dtype_that_is_none(model, name):
    with pytest.raises(ValueError, match="kv_cache_dtype must be auto or int8, got"):
        Session(model, kv_cache_dtype=name)
