"""Learning byte pair encoding: from texts to the list of merges, in plain Python.

Byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909) begins with bytes and joins the most
frequent pair of neighbours into a new token, again and again. Of ten words "hug", five "pug",
twelve "pun", four "bun" and five "hugs", the first merge is (u, g), which occurs 20 times, the next
(u, n) with 16, the third (h, ug) with 15:

    >>> words = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    >>> learn_merges(words, "bghnpsu", 3)
    [('u', 'g'), ('u', 'n'), ('h', 'ug')]

Done as the sentence says it, each merge would read the whole text. Three ideas make a second out of
10 MB of English and 4,096 merges:

1. **Words are counted.** No pair reaches across a cut between two words, so all there is to know of
   a text is how often each of its words occurs: ten thousand words instead of two million.
2. **An index.** Beside its count, each pair has the list of words it occurs in. A merge rewrites
   these, and changes the counts of the pairs at its seams only.
3. **A heap with lazy deletion.** It gives the most frequent pair without a look at the others. A
   count that went down is not searched for in the heap: when the entry comes up and is found to be
   out of date, it goes back in with the count of today. A count never goes up, for a merge adds
   only pairs that hold its new token, and those are new themselves. (No other merge can have made
   the same token: what happens inside a stretch of text that ends up as one token does not depend
   on what is around it.)

**Ties** are frequent, and decide what comes out. Of two pairs with the same count, the one whose
left token is older goes first, then the one whose right token is; the characters that the bytes are
written in are older than all merges, and among themselves ordered by code point. This is how the
`tokenizers` library has it, and the merges come out the same, all of them and in the same order.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from operator import add

MIN_COUNT = 2
"""A pair that occurs once is not worth an id."""

MAX_TOKEN_BYTES = 31
"""Longest token: a ruler of 500 equals signs in the training text is not worth one either."""

# A space after a printable character of ASCII begins a new word, whatever is around them: none of
# the alternatives of GPT-2's expression has a space anywhere but in front.
_BETWEEN_WORDS = re.compile("(?<=[!-~])(?= )")


def count_words(texts: Iterable[str], cut: Callable[[str], Iterable[str]]) -> Counter[str]:
    """How often each word occurs in the texts.

    Args:
        texts: the documents.
        cut: gives the words of a text, as the tokenizer will when it encodes, each written in
            :data:`~pyllm.tokenizers.byte_level.BYTE_CHARACTERS`; cuts in front of every space that
            follows a printable character of ASCII.

    A text is the same few words over and over: it is cut at such spaces first, which is quick, and
    each different piece is handed to `cut` only once. (10 MB: 0.8 s; without this, 2.9 s.)
    """
    pieces: Counter[str] = Counter()
    for text in texts:
        pieces.update(_BETWEEN_WORDS.split(text))
    words: Counter[str] = Counter()
    for piece, times in pieces.items():
        for word in cut(piece):
            words[word] += times
    return words


def learn_merges(
    words: Mapping[str, int], alphabet: Iterable[str], n_merges: int
) -> list[tuple[str, str]]:
    """The pairs to merge, first things first.

    Args:
        words: how often each word occurs.
        alphabet: the characters of the words, the oldest tokens, in the order that settles ties.
        n_merges: how many are wanted; fewer are found when no pair occurs twice any more.
    """
    tokens = list(alphabet)
    # From here on a word is a string of one character per token: the one whose code point is the
    # token's id. A pair is a string of two, a merge is a replacement, and the order of strings is
    # the order of ids.
    ids = {ord(character): id_ for id_, character in enumerate(tokens)}
    spelled = [word.translate(ids) for word in words]
    times = list(words.values())

    counts: dict[str, int] = defaultdict(int)
    where: dict[str, list[int]] = defaultdict(list)
    for place, word in enumerate(spelled):
        for pair in map(add, word, word[1:]):
            counts[pair] += times[place]
            where[pair].append(place)
    heap = [(-count, pair) for pair, count in counts.items()]  # the smallest comes first
    heapify(heap)

    merges: list[tuple[str, str]] = []
    while heap and len(merges) < n_merges:
        count, pair = heappop(heap)
        if -count != counts[pair]:
            heappush(heap, (-counts[pair], pair))
            continue
        if -count < MIN_COUNT:
            break
        left, right = (tokens[ord(id_)] for id_ in pair)
        if len(left) + len(right) > MAX_TOKEN_BYTES:
            continue
        merges.append((left, right))
        new = chr(len(tokens))
        tokens.append(left + right)

        found_in: dict[str, list[int]] = defaultdict(list)
        for place in where.pop(pair):  # a word that had it twice is here twice: nothing left to do
            stretches = spelled[place].split(pair)
            spelled[place] = new.join(stretches)
            for old_pair, new_pair in _seams(stretches, pair, new):
                counts[old_pair] -= times[place]
                counts[new_pair] += times[place]
                found_in[new_pair].append(place)
        where.update(found_in)
        for new_pair in found_in:
            heappush(heap, (-counts[new_pair], new_pair))
    return merges


def _seams(stretches: list[str], pair: str, new: str) -> Iterator[tuple[str, str]]:
    """The pair that goes and the pair that comes, wherever `new` has a neighbour.

    Args:
        stretches: what a word was cut into by taking the pair out: `xabyabab` by `ab` into `x`,
            `y`, nothing and nothing.
        pair: two tokens that are merged.
        new: the token that takes their place.
    """
    left, right = pair[0], pair[1]
    for stretch in stretches[:-1]:
        if stretch:
            yield stretch[-1] + left, stretch[-1] + new
    for stretch in stretches[1:]:
        if stretch:
            yield right + stretch[0], new + stretch[0]
    for stretch in stretches[1:-1]:
        if not stretch:  # the pair twice in a row
            yield right + left, new + new
