"""Replay one seed with its log, or run many. Exit code 1: a seed broke a rule, or no seed did.

python -m tests.simulation --seed 7
python -m tests.simulation --runs 10000 --first 0
python -m tests.simulation --mutants
python -m tests.simulation --mutants "parked ticket"
"""

import argparse
import gc
import os
import sys
import time
from collections import Counter


def main() -> int:
    os.environ["PDSERVE_COMPILED"] = "0"  # before anything of it is imported
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int, help="replay this one, with its log")
    what.add_argument("--runs", type=int, help="so many seeds, one after the other")
    what.add_argument(
        "--mutants",
        nargs="?",
        const="",
        help="plant every bug whose name has this, and look for it",
    )
    parser.add_argument("--first", type=int, default=0, help="seed of the first of --runs")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return replay(arguments.seed)
    if arguments.mutants is not None:
        return prove(arguments.mutants)
    return many(arguments.first, arguments.runs)


def replay(seed: int) -> int:
    from tests.simulation.run import simulate

    outcome = simulate(seed, keep_log=True)
    print("\n".join(outcome.log))
    print(f"seed {seed}: {outcome.virtual_s:.3f} virtual s, sha256 {outcome.digest}")
    print(outcome.violation or "all rules hold")
    return outcome.violation is not None


TELL_EVERY = 250
COLLECT_EVERY = 20
"""Seeds. A run leaves one heap of cycles behind, so to look for them while it lasts is in vain."""


def many(first: int, runs: int) -> int:
    from tests.simulation.run import simulate

    gc.disable()
    began_s = time.perf_counter()
    failed: list[int] = []
    outcomes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    virtual_s = 0.0
    for seed in range(first, first + runs):
        outcome = simulate(seed)
        outcomes.update(outcome.outcomes)
        faults.update(outcome.faults)
        virtual_s += outcome.virtual_s
        if outcome.violation is not None:
            failed.append(seed)
            print(f"seed {seed} ({', '.join(outcome.faults)}): {outcome.violation}", flush=True)
        if seed % COLLECT_EVERY == 0:
            gc.collect()
        if (seed + 1 - first) % TELL_EVERY == 0:
            elapsed_s = time.perf_counter() - began_s
            print(
                f"{seed + 1 - first} seeds in {elapsed_s:.0f} s, {len(failed)} failed", flush=True
            )
    elapsed_s = time.perf_counter() - began_s
    print(f"calls: {dict(sorted(outcomes.items()))}")
    print(f"faults: {dict(sorted(faults.items()))}")
    print(
        f"{runs} seeds from {first} on, {virtual_s:.0f} virtual s in {elapsed_s:.0f} s; "
        f"{len(failed)} failed"
        + (
            f": {failed[:20]}; replay: python -m tests.simulation --seed {failed[0]}"
            if failed
            else ""
        )
    )
    return bool(failed)


def prove(named: str) -> int:
    from tests.simulation.mutants import MUTANTS, hunt

    missed = 0
    for mutant in (each for each in MUTANTS if named in each.name):
        found = hunt(mutant)
        missed += not found.seeds
        print(
            f"| {found.mutant} | {found.seeds or 'not found'} | {found.violation[:100]} |",
            flush=True,
        )
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
