"""What the gateway knows of the deaths a request was in: how many, and how far it had come. Pure.

``router.suspicion`` says why deaths in one place count.
"""

from dataclasses import dataclass

from pdserve.suspicion import GUILTY_DEATHS, PROGRESS_TOKENS


@dataclass(slots=True)
class Suspicion:
    """Against one request, over all its attempts."""

    deaths: int = 0
    at: int = 0  # tokens delivered when the last worker died

    def implicated(self, delivered: int) -> None:
        """One more worker died computing it, when so many tokens had been delivered."""
        stood_still = self.deaths > 0 and delivered - self.at <= PROGRESS_TOKENS
        if not stood_still:
            self.deaths, self.at = 0, delivered
        self.deaths += 1

    def is_guilty(self, *, alone: bool) -> bool:
        return alone and self.deaths >= GUILTY_DEATHS
