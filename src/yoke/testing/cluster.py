"""A cluster without machines, for testing what stands in front of one. Its answers, failures and pauses are arguments; it keeps no time and opens nothing."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing

from yoke.core.errors import RequestError
from yoke.core.node import Device, Node, NodeId
from yoke.core.plan import Plan, whole_model
from yoke.core.request import ClusterStatus, Event, Finished, FinishReason, ModelCard, Piece, Request, Started
from yoke.core.spec import ModelSpec, Rope, RopeStyle

Answer = Sequence[str] | Callable[[Request], Iterable[str]]
"""The pieces of every answer, or a function from the request to them."""

CARD = ModelCard(name="tiny", context=128, vocabulary=256, has_chat_template=True, created_at=1_700_000_000)
NODE = Node(
    id=NodeId("0" * 64),
    name="fake",
    device=Device(name="CPU", description="no chip", backend="fake", free_bytes=2**30, matvec_bytes_per_s=1e9),
    measured_at=0.0,
)
PLAN = whole_model(
    ModelSpec(
        name="tiny",
        architecture="llama",
        n_blocks=2,
        width=8,
        n_heads=2,
        n_kv_heads=1,
        head_dim=4,
        columns=16,
        vocabulary=256,
        context=128,
        norm_epsilon=1e-5,
        rope=Rope(style=RopeStyle.INTERLEAVED, dims=4),
    ),
    NODE.id,
    "CPU",
)
# Times in the events: one piece every hundredth of a second of a clock that starts at 0.
STEP_S = 0.01


class FakeCluster:
    """A `yoke.core.request.Cluster` that answers by rote.

    Parameters
    ----------
    answer : the pieces of every answer, or a function that makes them from the request. Each piece counts as one token; ``max_tokens`` cuts them.
    cards : the models that are loaded.
    plan : what `status` shows; None is a cluster that is not ready.
    error : raised in place of the piece with index ``fail_at``.
    fail_at : -1 fails before `Started`; 0 after it; the number of pieces fails in place of `Finished`.

    Attributes
    ----------
    requests : every request that came, in order.
    cancelled : those that were closed before their end.
    removed : the names that were put out.
    running : how many are being answered now.
    going : cleared by `pause`, set by `resume`; awaited before each piece.
    """

    def __init__(
        self,
        answer: Answer = ("Hello", ",", " world"),
        *,
        cards: Sequence[ModelCard] = (CARD,),
        plan: Plan | None = PLAN,
        error: Exception | None = None,
        fail_at: int = -1,
    ) -> None:
        self.requests: list[Request] = []
        self.cancelled: list[Request] = []
        self.removed: list[str] = []
        self.running = 0
        self.going = asyncio.Event()
        self.going.set()
        self._answer = answer
        self._cards = tuple(cards)
        self._plan = plan
        self._error = error
        self._fail_at = fail_at
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"FakeCluster({len(self.requests)} requests: {self.running} running, {len(self.cancelled)} cancelled)"

    def pause(self) -> None:
        """Give no more pieces until `resume`."""
        self.going.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        self.going.set()

    async def until_running(self, count: int) -> None:
        """Wait until exactly ``count`` requests are being answered."""
        while self.running != count:
            await self._changed.wait()

    def models(self) -> tuple[ModelCard, ...]:
        """The cards given."""
        return self._cards

    async def status(self) -> ClusterStatus:
        """One node, and the plan given."""
        return ClusterStatus(nodes=(NODE,), plan=self._plan, running=self.running, queued=0)

    async def invite(self, uses: int, valid_s: float) -> str:
        """A text with both numbers."""
        return f"yoke-fake-{uses}-{valid_s:g}"

    async def open_code(self) -> str:
        """Always the same."""
        return "123 456"

    async def remove(self, name: str) -> None:
        """Remember the name; the fake node itself stays.

        Raises
        ------
        RequestError
            if it is another name than the fake node's.
        """
        if name != NODE.name:
            raise RequestError(f"there is no node named {name!r}", status=404)
        self.removed.append(name)

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        """Answer by rote; fails, pauses and is cancelled as the constructor and `pause` say."""
        self.requests.append(request)
        self._count(+1)
        is_over = False
        try:
            async with aclosing(self._events(request)) as events:
                async for event in events:
                    is_over = isinstance(event, Finished)
                    yield event
        except Exception:
            is_over = True
            raise
        finally:
            if not is_over:
                self.cancelled.append(request)
            self._count(-1)

    async def _events(self, request: Request) -> AsyncGenerator[Event, None]:
        prompt_tokens = self._admit(request)
        self._fail(-1)
        yield Started(prompt_tokens=prompt_tokens)
        pieces = iter(self._answer(request) if callable(self._answer) else self._answer)
        count, reason = 0, FinishReason.STOP
        for text in pieces:
            if count == request.max_tokens:
                reason = FinishReason.LENGTH
                break
            self._fail(count)
            await self.going.wait()
            # A real answer comes over a wire: others get their turn between two pieces.
            await asyncio.sleep(0)
            count += 1
            yield Piece(text=text, tokens=(count,), sampled_at_s=count * STEP_S)
        self._fail(count)
        yield Finished(reason=reason, prompt_tokens=prompt_tokens, completion_tokens=count, queue_s=0.0, prefill_s=STEP_S, decode_s=max(count - 1, 0) * STEP_S)

    def _admit(self, request: Request) -> int:
        card = next((card for card in self._cards if card.name == request.model), None)
        if card is None:
            raise RequestError(f"model {request.model!r} is not loaded", field="model", status=404)
        if request.messages is not None and not card.has_chat_template:
            raise RequestError(f"model {card.name!r} has no chat template; send a plain prompt", field="messages")
        words = len((request.text or "").split()) + len(request.tokens or ()) + sum(len(m.content.split()) for m in request.messages or ())
        if words > card.context:
            raise RequestError(f"the prompt takes {words} tokens; the context holds {card.context}", field="prompt")
        return words

    def _fail(self, moment: int) -> None:
        if self._error is not None and moment == self._fail_at:
            raise self._error

    def _count(self, change: int) -> None:
        self.running += change
        self._changed.set()
        self._changed = asyncio.Event()
