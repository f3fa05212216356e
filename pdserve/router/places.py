"""Who stands in a line, where leaving is cheap: a place is not searched for but becomes dead.

An entry has one live place, the last it was given. Whoever walks along the places passes over the
dead ones, and the lines that build on this drop them once they are more than the live ones.
"""

from typing import Any, Final

from pdserve.ids import RequestId
from pdserve.router.entry import Entry

DEAD_PLACES_MAX: Final = 32
"""Dead places a line keeps beyond as many as it has live ones."""

Place = tuple[Any, int, int, Entry]
"""Key, order of arrival, serial of this place (so that no two are equal), who."""


class Places:
    def __init__(self) -> None:
        self._live: dict[RequestId, Place] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._live

    def _place(self, entry: Entry, key: Any) -> Place:
        """Its place from now on."""
        assert entry.id not in self._live, f"{entry.id} waits already"
        self._serial += 1
        place = self._live[entry.id] = (key, entry.order, self._serial, entry)
        return place

    def _is_live(self, place: Place) -> bool:
        live = self._live.get(place[3].id)
        return live is not None and live[2] == place[2]
