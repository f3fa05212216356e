"""Streams of the gRPC port that any gateway can go on with, as those over HTTP
(``http/resuming.py``): the same ids, in messages and metadata instead of events and headers."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import replace

from pdserve.cluster.gateway.calls import Call
from pdserve.cluster.http.asking import flag_of
from pdserve.cluster.http.resuming import CHOICES_MAX, Trail, begin_of, digest_of
from pdserve.errors import InvalidField
from pdserve.proto.v1 import inference_pb2 as pb

LAST_METADATA = "pdserve-last-event-id"
WANTED_METADATA = "pdserve-resumable"

_DRAWN = re.compile(r"gen-([0-9a-f]{24})")


def resumable(
    call: Call,
    request: pb.GenerateRequest | pb.ChatRequest,
    metadata: Mapping[str, str],
    identity: str,
) -> tuple[Call, Trail | None]:
    """The call with the name and the seed that its ids carry, and the trail of its chunks; the same
    and none where no ids are wanted.

    Args:
        metadata: of the call, names in lower case.
        identity: of the model and its numerics.

    Raises:
        InvalidField: the id is not one of this request's, or it cannot have any.
    """
    last = metadata.get(LAST_METADATA)
    if last is None and not flag_of(metadata, WANTED_METADATA):
        return call, None
    if call.task is not None:
        raise InvalidField("prompt_logprobs", "cannot come with a stream that can be resumed")
    if call.n > CHOICES_MAX:
        raise InvalidField("n", f"makes {call.n} choices, a resumable stream has {CHOICES_MAX}")
    said = {request.DESCRIPTOR.name: request.SerializeToString(deterministic=True).hex()}
    digest = digest_of(said, [call.prompt], call.tenant, identity)
    drawn = _DRAWN.fullmatch(call.call)
    name = drawn[1] if drawn else secrets.token_hex(12)
    begin = begin_of(last, digest, call.n, name=name, seed=call.seed, field=LAST_METADATA)
    trail = Trail(begin)
    return replace(call, call=request.id or f"gen-{begin.name}", seed=begin.seed), trail
