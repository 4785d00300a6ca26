"""Arms of `eval acre`: what is held of a thread that is longer than the window, and what is seen of it when asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kv_retract.engine.bilayer import BiLayer, BiLayerEngine
from kv_retract.engine.hf import HFEngine
from kv_retract.errors import LandmarkMismatchError
from kv_retract.registry import Registry

from .acre_readers import BiLayerReader, CountingEngine, EndsReader, LongThread, Reader, RetrievingReader

if TYPE_CHECKING:
    from kv_retract.engine.models import LoadedModel
    from kv_retract.ledger.render import Renderer

OVERLAP = 64
"""Tokens of the window before that a window of a bi-layer cache reads; an eighth of a window that is short."""
PASSAGE = 128
"""Longest passage that is retrieved, in tokens."""

_KEPT = BiLayer()
"""As threads are kept by default."""

LONG_ARMS: Registry[LongArm] = Registry("arm", "kv_retract.long_arms")
"""Factories of arms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a reader works, and how much it must hold."""

    loaded: LoadedModel
    renderer: Renderer
    window: int
    """Tokens."""
    landmarks: str
    """As in `BiLayer`, for arms that do not say which."""
    thread: LongThread
    tail: int
    """Most tokens of a question and its answer."""

    def engine(self, max_tokens: int) -> HFEngine:
        """Return an engine with an empty pool."""
        return HFEngine(self.loaded.model, max_tokens=max_tokens, name=self.loaded.name)


class LongArm(ABC):
    """Strategy: how a long thread is held."""

    @abstractmethod
    def open(self, place: Place) -> Reader | None:
        """Return a reader for one thread; None where the model cannot hold it in this way.

        Raises:
            ValueError: the parameters do not fit together, or not to the model.
            LandmarkMismatchError: the landmarks are missing, or belong to another model.
        """

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Tokens that a landmark stands for, and most tokens that are brought back; None: the arm has no such."""
        return None, None


@LONG_ARMS.register("full")
@dataclass(frozen=True, kw_only=True)
class Full(LongArm):
    """Attends to everything, where the model has so many positions."""

    def open(self, place: Place) -> Reader | None:
        """See the base class."""
        needed = len(place.thread) + place.tail
        most: int = place.loaded.model.config.max_position_embeddings
        return Reader(place.engine(needed), place.renderer) if needed <= most else None


@LONG_ARMS.register("truncate")
@dataclass(frozen=True, kw_only=True)
class Truncate(LongArm):
    """Sees the newest tokens of the thread; the system prompt is dropped with what is older."""

    tokens: int | None = None
    """None: a window."""

    def open(self, place: Place) -> Reader:
        """See the base class."""
        newest = self.tokens or place.window
        return EndsReader(place.engine(newest + place.tail), place.renderer, first=0, newest=newest)


@LONG_ARMS.register("sinks")
@dataclass(frozen=True, kw_only=True)
class Sinks(LongArm):
    """Sees the first and the newest tokens, at consecutive positions (StreamingLLM, arXiv 2309.17453).

    What is kept is read anew without the rest: the paper's sliding window with re-computation, and sinks.
    """

    sinks: int = _KEPT.sinks
    tokens: int | None = None
    """Newest ones. None: a window."""

    def open(self, place: Place) -> Reader:
        """See the base class."""
        newest = self.tokens or place.window
        engine = place.engine(self.sinks + newest + place.tail)
        return EndsReader(engine, place.renderer, first=self.sinks, newest=newest)


@LONG_ARMS.register("bm25")
@dataclass(frozen=True, kw_only=True)
class BM25(LongArm):
    """Retrieves messages by the words of the question, and reads them anew before the newest messages.

    The first message, which is the system prompt, always stays. Messages keep template, role and order.
    """

    refill: int = _KEPT.refill
    """Most tokens that are retrieved."""
    tokens: int | None = None
    """Most tokens of the newest messages. None: a window."""

    def open(self, place: Place) -> Reader:
        """See the base class."""
        newest, first = self.tokens or place.window, int(place.thread.borders[0]) if len(place.thread.borders) else 0
        engine = place.engine(first + self.refill + newest + place.tail)
        return RetrievingReader(engine, place.renderer, budget=self.refill, newest=newest, longest=PASSAGE)

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """See the base class."""
        return None, self.refill


@dataclass(frozen=True, kw_only=True)
class BiLayerArm(LongArm):
    """A bi-layer cache, with trained landmarks where there are some; fields as in `engine.bilayer.BiLayer`.

    Unless it is told otherwise, the local part has at most a window and the newest tokens that choose: about what the
    other arms see of the end of a thread.
    """

    ratio: int = _KEPT.ratio
    refill: int = _KEPT.refill
    landmarks: str = ""
    """Nothing: those of the place."""
    local: int | None = None
    overlap: int | None = None
    queries: int = _KEPT.queries
    rounds: int = _KEPT.rounds
    refresh: int = _KEPT.refresh

    def open(self, place: Place) -> BiLayerReader:
        """See the base class."""
        return self.open_as(CountingEngine, place)

    def open_as(self, kind: type[BiLayerEngine], place: Place) -> BiLayerReader:
        """As `open`, with a kind of engine."""
        settings = self.settings(place)
        # A question may make a window of the thread's oldest local tokens: room for what is local then, too.
        pool = settings.local + 2 * (settings.queries + place.tail)
        return BiLayerReader(kind(place.engine(pool), settings), place.renderer)

    def settings(self, place: Place) -> BiLayer:
        """Return how threads are kept at a place."""
        window = place.window
        return BiLayer(
            window=window, ratio=self.ratio, refill=self.refill, queries=self.queries, rounds=self.rounds,
            refresh=self.refresh,
            overlap=min(OVERLAP, window // 8) if self.overlap is None else self.overlap,
            local=window + self.queries if self.local is None else self.local,
            landmarks=self.landmarks or place.landmarks,
            max_tokens=((len(place.thread) + place.tail) // window + 1) * window,
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """See the base class."""
        return self.ratio, self.refill


@LONG_ARMS.register("acre")
@dataclass(frozen=True, kw_only=True)
class Acre(BiLayerArm):
    """A bi-layer cache with trained landmarks, and with nothing else (ACRE, arXiv 2412.12486)."""

    def open_as(self, kind: type[BiLayerEngine], place: Place) -> BiLayerReader:
        """See the base class."""
        reader = super().open_as(kind, place)
        if not reader.engine.landmarks.are_tokens:
            raise LandmarkMismatchError(
                f"expected trained landmarks of model {place.loaded.name!r}, and none are bundled; pass --landmarks "
                "DIR with a folder that kv-retract train acre wrote, or leave it to the arm pooled"
            )
        return reader


@LONG_ARMS.register("l1_only")
@dataclass(frozen=True, kw_only=True)
class LandmarksOnly(Acre):
    """As `acre`, with nothing brought back: older windows are seen through landmarks only, if these are attended to."""

    refill: int = 0


@LONG_ARMS.register("pooled")
@dataclass(frozen=True, kw_only=True)
class Pooled(BiLayerArm):
    """A bi-layer cache with landmarks that need no training."""

    landmarks: str = "pooled"
