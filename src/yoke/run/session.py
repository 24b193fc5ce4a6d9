"""One sequence being generated. Its tokens are the session: the cache can be rebuilt anywhere by computing them again."""

from dataclasses import dataclass, field

from yoke.core.request import Sampling

NO_SLOT = -1


@dataclass(slots=True, kw_only=True, eq=False)
class Session:
    """The one mutable noun of the engine.

    ``tokens`` are the prompt's and then the drawn ones; the first ``n_sent`` of them have been given to the stages, at the cache ``cells`` of the same index.
    ``awaits_draw`` while a step that will draw the next token is in flight.
    """

    id: str
    tokens: list[int]
    n_prompt: int
    max_tokens: int
    sampling: Sampling
    slot: int = NO_SLOT
    n_sent: int = 0
    cells: list[int] = field(default_factory=list)
    awaits_draw: bool = False
    is_over: bool = False
    last_step: int = -1

    @property
    def n_pending(self) -> int:
        """Tokens that the stages have not seen."""
        return len(self.tokens) - self.n_sent

    @property
    def n_drawn(self) -> int:
        """Tokens written so far."""
        return len(self.tokens) - self.n_prompt

    @property
    def is_decoding(self) -> bool:
        """Whether the prompt has been read: one token a step from here on."""
        return self.n_drawn > 0 and self.n_pending <= 1
