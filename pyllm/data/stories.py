"""Endless small stories, the project's own, so that a model can be trained without any download.

A story joins an opening, one of about twenty plots and an ending. Its character, thing, place,
animal and feelings are drawn once and used throughout; every sentence is drawn from several ways
to say it. What a model must do beyond learning by heart is measured on held-out combinations: each
triple of (name, thing, plot) belongs to either "train" or "valid", so that a validation story
tells of somebody to whom, with this thing, this never happened in training.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from pyllm._checks import check_size, shown
from pyllm.data import story_words as words
from pyllm.data.story_plots import PLOTS
from pyllm.data.story_plots_more import MORE_PLOTS

SPLITS = ("train", "valid")
MIN_WORDS, MAX_WORDS = 80, 220
# One triple in this many is held out for validation.
HELD_OUT = 20

INTROS = """
Once upon a time, there was a {trait} {kid} named {n}.
There once was a {trait} {kid} called {n}, who lived {live}.
{n} was a {trait} {kid} with {look}.
Once there lived a {trait} {kid} {live}. {His} name was {n}.
{n} was a {trait} {kid} who lived with {his} {adult} {live}.
This is the story of {n}, a {trait} {kid} with {look}.
Long ago, a {trait} {kid} named {n} lived {live}.
There was a {trait} {kid} named {n}. {He} had {look}.
"""

ENDINGS = """
The end.
And that is how it was.
It was a day to remember.
{n} fell asleep with a smile that night.
That evening they had {meal}, and {n} told the whole story twice.
"What a day!" said {n}, and {he} yawned.
{Adult} kissed {him} good night and turned off the light.
"What did you learn today?" asked {Adult}. {n} smiled. "A lot," {he} said.
In the window, the moon was shining, and all was well.
And if you go there today, you may still meet {him}.
"""

CHOICE = re.compile(r"\[([^][]*)\]")
FIELD = re.compile(r"\{(\w+)\}")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!uni|use|one\b)")


@dataclass(frozen=True)
class Slot:
    """One step of a plot: the ways to say it."""

    lines: tuple[str, ...]
    optional: bool
    new_paragraph: bool


@dataclass(frozen=True)
class Plot:
    """What happens, to which kinds of things, at which kind of place ("any" is all), to whom."""

    name: str
    kinds: tuple[str, ...]
    door: str
    traits: str
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Story:
    """A story's text and the triple that decides its split."""

    text: str
    name: str
    thing: str
    plot: str


def write_stories(n: int, seed: int, split: str = "train") -> Iterator[str]:
    """`n` stories of 80 to 220 words; the same for the same arguments.

    The first stories of a longer request are those of a shorter one. Raises ValueError for a
    negative `n` or `seed` and for a split other than "train" and "valid".
    """
    return (story.text for story in tell_stories(n, seed, split))


def tell_stories(n: int, seed: int, split: str = "train") -> Iterator[Story]:
    """`write_stories`, with what each story is about."""
    n, seed = check_size("n", n, 0), check_size("seed", seed, 0)
    if split not in SPLITS:
        raise ValueError(f"split is {shown(split)}; expected one of {', '.join(SPLITS)}")
    # A string seeds the generator through sha512, alike on every machine and Python.
    rng = random.Random(f"stories:{split}:{seed}")
    return (_tell(rng, split) for _ in range(n))


def split_of(name: str, thing: str, plot: str) -> str:
    """The split that a triple belongs to: a hash decides, one in twenty is "valid"."""
    return SPLITS[zlib.crc32(f"{name}|{thing}|{plot}".encode()) % HELD_OUT == 0]


def _parse_plots(text: str) -> list[Plot]:
    plots = []
    for part in ("\n" + text).split("\n== ")[1:]:
        header, body = part.split("\n", 1)
        name, kinds, door, traits = (field.strip() for field in header.split("|"))
        slots = []
        for block in body.strip().split("\n\n"):
            flags = block.split(" ", 1)[0]
            optional, new_paragraph = flags == "?", flags == "~"
            lines = block.removeprefix("? ").removeprefix("~ ").splitlines()
            slots.append(Slot(tuple(lines), optional, new_paragraph))
        plots.append(Plot(name, tuple(kinds.split()), door, traits, tuple(slots)))
    return plots


ALL_PLOTS = tuple(_parse_plots(PLOTS) + _parse_plots(MORE_PLOTS))

_NAMES = {"girl": tuple(words.GIRLS.split()), "boy": tuple(words.BOYS.split())}
_PRONOUNS = {
    "girl": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "boy": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
}
_TRAITS = {
    "default": words.choices(words.TRAITS),
    "shy": words.choices(words.SHY_TRAITS),
    "proud": words.choices(words.PROUD_TRAITS),
}
_LISTS = {
    "look": words.choices(words.HAIR),
    "live": words.choices(words.HOMES),
    "joy": words.choices(words.JOYS),
    "sad": words.choices(words.SORROWS),
    "smile": words.choices(words.SMILES),
    "meal": words.choices(words.MEALS),
    "treat": words.choices(words.TREATS),
}
_COLOURS = words.choices(words.COLOURS)
_FAIR_DAYS, _ANY_DAYS = words.choices(words.FAIR_DAYS), words.choices(words.ANY_DAYS)
_NEIGHBOURS = words.choices(words.NEIGHBOURS)
_INTROS = tuple(INTROS.strip().splitlines())
_ENDINGS = tuple(ENDINGS.strip().splitlines())
_SMALL_ANIMALS = [animal for animal in words.ALL_ANIMALS if animal.small]
_THINGS = {
    plot.name: [thing for kind in plot.kinds for thing in words.THINGS_BY_KIND[kind]]
    for plot in ALL_PLOTS
}
_PLACES = {
    door: [place for place in words.ALL_PLACES if door in (*place.kinds, "any")]
    for door in {plot.door for plot in ALL_PLOTS}
}


def _tell(rng: random.Random, split: str) -> Story:
    while True:
        plot = rng.choice(ALL_PLOTS)
        thing = rng.choice(_THINGS[plot.name])
        kid = rng.choice(("girl", "boy"))
        name = rng.choice(_NAMES[kid])
        if split_of(name, thing.noun, plot.name) != split:
            continue
        text = _write(rng, plot, _cast(rng, plot, thing, kid, name))
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return Story(text, name, thing.noun, plot.name)


def _cast(
    rng: random.Random, plot: Plot, thing: words.Thing, kid: str, name: str
) -> dict[str, str]:
    """The words of one story, by their names in the templates."""
    friend_kid = "boy" if kid == "girl" else "girl"
    place = rng.choice(_PLACES[plot.door])
    animal = rng.choice(_SMALL_ANIMALS if "in" in place.kinds else words.ALL_ANIMALS)
    # Nobody wants a blue pancake.
    colours = () if thing.kind in ("food", "plant") else rng.sample(_COLOURS, 2)
    neighbour, neighbour_kid = rng.choice(_NEIGHBOURS).split("/")
    colour, colour2 = rng.sample(_COLOURS, 2)
    cast = {key: rng.choice(entries) for key, entries in _LISTS.items()}
    cast.update(_PRONOUNS[kid])
    cast.update({f"f{key}": word for key, word in _PRONOUNS[friend_kid].items()})
    cast.update(
        n=name,
        kid=kid,
        trait=rng.choice(_TRAITS[plot.traits]),
        f=rng.choice(_NAMES[friend_kid]),
        fkid=friend_kid,
        adult=rng.choice(("mom", "dad", "grandma", "grandpa")),
        nb=neighbour,
        nkid=neighbour_kid,
        o=thing.noun,
        ao=f"{rng.choice((*thing.adjectives, *colours))} {thing.noun}",
        play=thing.play,
        skill=thing.play.replace(" the ", " a "),
        place=place.name,
        at=place.at,
        sight=rng.choice(place.sights),
        hide=rng.choice(place.hides),
        sound=rng.choice(place.sounds),
        an=animal.noun,
        aadj=rng.choice(animal.adjectives),
        acry=animal.cry,
        amove=animal.move,
        afood=animal.food,
        ahome=animal.home,
        day=rng.choice(_FAIR_DAYS if "out" in place.kinds else _ANY_DAYS),
        colour=colour,
        colour2=colour2,
        they_two=rng.choice(("the two of them", "the two children", f"{name} and {{f}}")),
    )
    return cast


def _write(rng: random.Random, plot: Plot, cast: dict[str, str]) -> str:
    paragraphs = [[rng.choice(_INTROS)]]
    for slot in plot.slots:
        if slot.optional and rng.random() < 0.5:
            continue
        if slot.new_paragraph:
            paragraphs.append([])
        paragraphs[-1].append(rng.choice(slot.lines))
    if rng.random() < 0.6:
        paragraphs[-1].append(rng.choice(_ENDINGS))
    text = "\n".join(" ".join(sentences) for sentences in paragraphs)
    text = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)
    while FIELD.search(text):  # a word may hold fields of its own
        text = FIELD.sub(lambda match: _word(match[1], cast), text)
    return ARTICLE.sub(r"\1n ", text)


def _word(key: str, cast: dict[str, str]) -> str:
    if key in cast:
        return cast[key]
    word = cast[key[0].lower() + key[1:]]
    return word[0].upper() + word[1:]
