from pdserve.router.prefix_index import PrefixIndex
from tests.unit.router.build import keys

DOCUMENT = keys("a", 8)


def _index(**held: int) -> PrefixIndex:
    """Locations that hold so many leading blocks of the document."""
    index = PrefixIndex()
    for location, count in held.items():
        index.update(location, DOCUMENT[:count], ())
    return index


def test_a_prefix_ends_at_the_first_block_that_is_missing() -> None:
    index = _index(p0=5)
    index.update("p0", (), DOCUMENT[2:3])
    assert index.prefix_blocks(DOCUMENT, ["p0"]) == 2


def test_locations_make_up_for_each_other() -> None:
    index = _index(p0=3)
    index.update("store", DOCUMENT[3:6], ())
    assert index.prefix_blocks(DOCUMENT, ["p0", "store"]) == 6
    assert index.prefix_blocks(DOCUMENT, ["store"]) == 0


def test_everything_may_be_there_and_nothing() -> None:
    index = _index(p0=8)
    assert index.prefix_blocks(DOCUMENT, ["p0"]) == 8
    assert index.prefix_blocks((), ["p0"]) == 0
    assert index.prefix_blocks(DOCUMENT, ["unknown"]) == 0


def test_what_came_back_within_one_report_is_there() -> None:
    index = _index(p0=1)
    index.update("p0", DOCUMENT[:1], DOCUMENT[:1])
    assert index.prefix_blocks(DOCUMENT, ["p0"]) == 1


def test_a_forgotten_location_has_nothing() -> None:
    index = _index(p0=8, p1=2)
    index.forget("p0")
    index.forget("p0")
    assert index.prefix_blocks(DOCUMENT, ["p0"]) == 0
    assert index.prefix_blocks(DOCUMENT, ["p1"]) == 2


def test_a_location_is_remembered_up_to_a_bound() -> None:
    index = PrefixIndex(location_keys_max=3)
    index.update("p0", DOCUMENT, ())
    assert index.key_count("p0") == 3
    assert index.prefix_blocks(DOCUMENT[5:], ["p0"]) == 3
