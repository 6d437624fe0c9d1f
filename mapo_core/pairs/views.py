"""Some pairs of other sets without a copy of them: four bytes per pair, for sets that stay in their files."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import chain, compress
from typing import TYPE_CHECKING, overload

import numpy as np

from .pair_list import KEPT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .pair import PreferencePair


class PairView(Sequence["PreferencePair"]):
    """Pairs of one or more sequences, one after the other; made by `picked`."""

    def __init__(self, sources: Sequence[Sequence[PreferencePair]], wanted: np.ndarray) -> None:
        """Use `picked`."""
        self._sources = sources
        self._places = np.flatnonzero(wanted).astype(np.int32)  # in all sources together
        self._starts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferencePair]: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | list[PreferencePair]:
        """A pair, or a list of some."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = int(self._places[index])
        source = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._sources[source][place - int(self._starts[source])]

    def __iter__(self) -> Iterator[PreferencePair]:
        """All pairs, in one way through each source."""
        wanted = np.zeros(int(self._starts[-1]), bool)
        wanted[self._places] = True
        return compress(chain.from_iterable(self._sources), wanted)


def picked(sources: Sequence[Sequence[PreferencePair]], wanted: np.ndarray) -> Sequence[PreferencePair]:
    """The wanted pairs of some sequences, bool [N] over all of them: a list if they are few, else a view."""
    view = PairView(sources, wanted)
    return view if len(view) > KEPT else list(view)


def sample_places(count: int, seed: str) -> Sequence[int]:
    """The places of all pairs or, of a large set, of so many drawn at random as are held in memory."""
    return range(count) if count <= KEPT else sorted(random.Random(seed).sample(range(count), KEPT))


def pairs_at(pairs: Sequence[PreferencePair], places: Sequence[int]) -> Iterator[tuple[int, PreferencePair]]:
    """Places and pairs; of a file all of them are read in one go, some one by one."""
    return enumerate(pairs) if len(places) == len(pairs) else ((i, pairs[i]) for i in places)


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """64 bits of each text, uint64 [N]. Among 10^7 different ones, two are taken for the same once in 10^5 sets."""
    return np.fromiter(
        (int.from_bytes(blake2b(t.encode(errors="surrogatepass"), digest_size=8).digest(), "big") for t in texts),
        np.uint64,
    )


def count_different(texts: Iterable[str]) -> int:
    """How many different texts there are."""
    return len(np.unique(text_hashes(texts)))
