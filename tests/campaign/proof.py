"""That the campaign can fail: each mutant in turn, until it is red or its time is over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.campaign.campaign import Plan, Result, run
from tests.campaign.mutants import ALL, MUTANTS, Mutant

STRIKE_EVERY_S = 0.5
AUDIT_EVERY_S = 4.0
CONTROL_S = 10.0


@dataclass(frozen=True, slots=True)
class Proof:
    mutant: Mutant
    result: Result

    @property
    def holds(self) -> bool:
        """A mutant must be red; its control, which has every guard, must not."""
        return self.result.is_green == self.mutant.is_control

    @property
    def found_by(self) -> str:
        return self.result.failures[0].kind if self.result.failures else "nothing"


def prove_one(mutant: Mutant, seed: int) -> Proof:
    seconds = CONTROL_S if mutant.is_control else mutant.budget_s
    plan = Plan(
        seed=seed,
        seconds=seconds,
        strike_every_s=STRIKE_EVERY_S,
        audit_every_s=AUDIT_EVERY_S,
        mutant=mutant,
    )
    return Proof(mutant, run(plan))


def prove(
    seed: int, say: Callable[[str], None], mutants: Sequence[Mutant] = ALL
) -> tuple[Proof, ...]:
    """All of them, each with its control behind it, where it has one."""
    proofs = []
    for mutant in mutants:
        control = MUTANTS.get(f"control-{mutant.name}")
        for each in (mutant,) if control is None else (mutant, control):
            proof = prove_one(each, seed)
            say(describe(proof))
            proofs.append(proof)
    return tuple(proofs)


def describe(proof: Proof) -> str:
    result = proof.result
    what = (
        f"green for {result.seconds:.1f} s"
        if result.is_green
        else f"red after {result.seconds:.1f} s: {proof.found_by}"
    )
    return f"{'as it must be' if proof.holds else 'WRONG':14}{proof.mutant.name:20} {what}"
