"""How to draw the next token. Needs no torch."""

from dataclasses import dataclass

from pyllm._checks import check_size, is_finite, shown


@dataclass(frozen=True)
class SamplingConfig:
    """Temperature, then top-k, then top-p, in the order of Hugging Face's ``generate``.

    Raises:
        ValueError: a setting out of its range.
    """

    max_new_tokens: int = 256
    """Most tokens to write; fewer when the story ends."""
    temperature: float = 0.8
    """Above 0; below 1 prefers likely words, above 1 evens the odds."""
    top_k: int = 0
    """Draw from this many of the most likely tokens; 0 for all."""
    top_p: float = 0.95
    """Draw from the fewest most likely tokens whose probabilities reach this sum (nucleus
    sampling, arXiv:1904.09751); 1 for all."""
    greedy: bool = False
    """Always take the most likely token; the settings above but the first do not matter then."""
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
        if not isinstance(self.greedy, bool):
            raise ValueError(f"greedy must be true or false, got {shown(self.greedy)}")
