"""The beams of one request on the device: sequences that share blocks and part where they differ.

    root     the prompt as it was handed over; it stays as it is and belongs to nobody else
    beams    one sequence for each live hypothesis, in the search's order

After a step the search names the *branches*: which beam each new one continues, with which token.
Beams that none continues are dropped at once. The others branch when there is room for it, shortly
before the next step. A full block is shared by reference count and never written to again; the
block that is being filled is *copied on writing*: the last branch of a beam goes on in it, every
other one, and all that the root has, gets a copy.

The root makes a search cheap to give up and to take up again. Whoever must leave (blocks are
short, or the worker drains) leaves as it came: prompt and first candidates, as prefill handed them
over; the search begins again wherever there is room, and comes to the same answers.
"""

from collections.abc import Callable
from collections.abc import Sequence as Tokens

from pdserve.decode.beams import BeamSearch, Branch
from pdserve.engine.blocks import BlockPool
from pdserve.engine.sequence import Ending, Sequence
from pdserve.engine.workplace import Workplace
from pdserve.errors import InvalidField
from pdserve.messages import Token


class BeamGroup:
    def __init__(self, root: Sequence, first: Token) -> None:
        """``first`` was drawn after the prompt: the best candidate, and all of them with it."""
        request = root.request
        assert request.beams is not None, f"{root.id} is no beam search"
        self.root = root
        self.first = first
        self.search = BeamSearch(
            request.beams,
            prompt_tokens=request.prompt_tokens,
            generated_max=root.tokens_left,
            enders=root.enders,
            logprobs=request.sampling.logprobs,
        )
        self.beams: list[Sequence] = []
        self._branches: list[Branch] | None = self._advance([root], [first])

    @property
    def missing_blocks(self) -> int:
        """Blocks to be taken before the next step."""
        if self._branches is None:
            return 0
        if not self.beams or self.beams[0].kv_count % self.root.table.block_tokens == 0:
            return len(self._branches)
        return len(self._branches) - len({branch.parent for branch in self._branches})

    def advance(self, drawn: Tokens[Token], pool: BlockPool) -> None:
        """After a step: each beam has KV for its last token, and candidates for the next."""
        for beam in self.beams:
            beam.kv_count += 1
        self._branches = self._advance(self.beams, drawn)
        parents = {branch.parent for branch in self._branches}
        for index, beam in enumerate(self.beams):
            if index not in parents:
                pool.release(beam.blocks)
                beam.blocks.clear()

    def branch(self, pool: BlockPool, copy_block: Callable[[int, int], None]) -> None:
        """Make the beams of the next step, each with a place for its last token; takes
        ``missing_blocks``."""
        if self._branches is None:
            return
        parents = self.beams or [self.root]
        last = {branch.parent: at for at, branch in enumerate(self._branches)}
        beams = []
        for at, branch in enumerate(self._branches):
            parent = parents[branch.parent]
            is_inherited = parent is not self.root and last[branch.parent] == at
            beam = parent if is_inherited else _forked(parent, pool, copy_block)
            beam.accept(branch.token)
            missing = max(0, beam.table.blocks_needed(len(beam.tokens)))
            beam.blocks.extend(pool.take(missing))
            beams.append(beam)
        self.beams, self._branches = beams, None

    def say_answers(self, workplace: Workplace) -> None:
        """To the client, once the search is over."""
        best, n = self.search.best(), self.search.n
        if len(best) < n:
            problem = f"is {n}, but only {len(best)} answers exist; ask for fewer"
            workplace.say_error(self.root, InvalidField("n", problem))
            return
        for index, finished in enumerate(best):
            workplace.say_hypothesis(self.root, index, finished.tokens, finished.ending)

    def _advance(self, parents: Tokens[Sequence], drawn: Tokens[Token]) -> list[Branch]:
        def ends(parent: int, token: int) -> Ending | None:
            return parents[parent].would_end(token)

        candidates = []
        for token in drawn:
            assert token.logprob is not None, "a beam search asks for logprobs"
            candidates.append(token.logprob.top)
        return self.search.advance(candidates, ends)


def _forked(parent: Sequence, pool: BlockPool, copy_block: Callable[[int, int], None]) -> Sequence:
    """A sequence with the parent's past: its full blocks are shared, the tail is a copy."""
    beam, full = parent.fork(), parent.full_blocks
    pool.share(parent.blocks[:full])
    beam.blocks.extend(parent.blocks[:full])
    if parent.tail_block is not None:
        (tail,) = pool.take(1)
        copy_block(parent.tail_block, tail)
        beam.blocks.append(tail)
    return beam
