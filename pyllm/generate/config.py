"""How to draw the next token. Needs no torch."""

from dataclasses import dataclass

from pyllm._checks import check_number, check_size, check_text, is_finite, shown


@dataclass(frozen=True)
class SamplingConfig:
    """Repetition penalty, temperature, top-k, top-p, min-p: in the order of Hugging Face.

    Raises:
        ValueError: a setting out of its range.
    """

    max_new_tokens: int = 256
    """Most tokens to write; fewer when the text ends."""
    temperature: float = 0.8
    """Above 0; below 1 prefers likely words, above 1 evens the odds."""
    top_k: int = 0
    """Draw from this many of the most likely tokens; 0 for all."""
    top_p: float = 0.95
    """Draw from the fewest most likely tokens whose probabilities reach this sum (nucleus
    sampling, arXiv:1904.09751); 1 for all."""
    min_p: float = 0.0
    """Draw only tokens at least this fraction as likely as the likeliest (arXiv:2407.01082); 0 for
    all."""
    repetition_penalty: float = 1.0
    """Above 1 makes a token that the text already holds, prompt included, less likely: a logit
    above 0 is divided by it, one below 0 multiplied (arXiv:1909.05858); 1 for no difference. Not
    for the tokens that end a text, nor for what every text begins with."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these; it is not written itself. The name of a special
    token, such as <|im_end|>, means the token, too."""
    greedy: bool = False
    """Always take the most likely token. Of the settings above, only the penalty, the stop strings
    and the number of tokens matter then."""
    seed: int | None = None
    """The same seed gives the same text; None for another one each time."""

    def __post_init__(self) -> None:
        check_size("max_new_tokens", self.max_new_tokens, 1)
        check_size("top_k (0 for all)", self.top_k, 0)
        if self.seed is not None:
            check_size("seed", self.seed, 0, 2**63 - 1)
        if not is_finite(self.temperature) or self.temperature <= 0:
            raise ValueError(
                f"temperature must be above 0 and finite, got {shown(self.temperature)}; "
                "for the most likely word each time, use greedy"
            )
        if not is_finite(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {shown(self.top_p)}")
        check_number("min_p", self.min_p, 0, 1)
        # Beyond, a logit times the penalty would overflow.
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if not isinstance(self.greedy, bool):
            raise ValueError(f"greedy must be true or false, got {shown(self.greedy)}")
        # A single string would pass for a tuple of its letters.
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, tuple | list) or "" in stop:
            raise ValueError(f"stop must be texts that are not empty, got {shown(self.stop)}")
        for text in stop:
            check_text(text, "a text in stop")
        object.__setattr__(self, "stop", tuple(stop))
