"""Which router leads: a pure function from what a candidate did and what came of it to what it
does next.

    Look ──nobody has led──► Claim 1 ──it is ours──► Lead
      │                        ▲  │                   │ a younger epoch is heard of: the core is
      │ somebody leads         │  │ another was first │ thrown away, and we look again
      ▼                        │  ▼                   ▼
    Watch ──it is gone─────────┘ Watch               Look

An *epoch* is claimed by being the first to enter one's address under its number in a register that
never changes an entry. So no two routers ever lead in one epoch, whatever either believes of the
other; and whoever has heard of an epoch takes nothing from an older one. There is no lease that has
to be renewed: losing the register stops nobody who leads, it only keeps others from succeeding.

That the leader is gone is judged by its connection: closed, or silent. Who judges wrongly costs
some prefills, since the deposed one gives its requests up, but no token: of two schedulers with
different workers both are right, and a gateway submits each attempt to one of them.
"""

from dataclasses import dataclass

from pdserve.messages import Address

FIRST_EPOCH = 1


@dataclass(frozen=True, slots=True)
class Term:
    """An entry of the register."""

    epoch: int
    leader: Address


# ── what a candidate does ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Look:
    """Ask the register for its latest term; ``again``: not at once."""

    again: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """Enter oneself for this epoch, and ask which term is the latest then."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Watch:
    """Keep a connection to the leader, until it is gone or leads no more."""

    term: Term


@dataclass(frozen=True, slots=True)
class Lead:
    """Until a younger epoch is heard of."""

    epoch: int


Doing = Look | Claim | Watch | Lead


# ── what comes of it ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Found:
    """The register's latest term; None: it is empty."""

    term: Term | None


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The register cannot be reached. What was to be entered may have been, or not."""


@dataclass(frozen=True, slots=True)
class Gone:
    """The watched leader has hung up, cannot be reached, or says nothing."""


@dataclass(frozen=True, slots=True)
class Deposed:
    """Somebody has heard of a younger epoch; or the watched router says that it does not lead."""


Outcome = Found | Unanswered | Gone | Deposed


def next_doing(done: Doing, outcome: Outcome, own: Address) -> Doing:
    """What the candidate at ``own`` does after ``done`` has come to ``outcome``."""
    match done, outcome:
        case (Look() | Claim(), Unanswered()):
            return Look(again=True)
        case (Look(), Found(None)):
            return Claim(FIRST_EPOCH)
        case (Look() | Claim(), Found(Term() as term)):
            return Lead(term.epoch) if term.leader == own else Watch(term)
        case (Watch(term), Gone()):
            return Claim(term.epoch + 1)
        case (Watch(), Deposed()):
            return Look(again=True)
        case (Lead(), Deposed()):
            return Look()
        case _:
            raise AssertionError(f"{done} cannot come to {outcome}")
