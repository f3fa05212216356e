"""What vLLM's engine service is asked for, in the port's own messages.

What only makes sense inside a vLLM deployment, another engine's hand-off above all, is refused: it
would name blocks that are somebody else's.
"""

from pdserve.clock import steady_unix_ms
from pdserve.cluster.gateway.calls import Call, Session
from pdserve.cluster.gateway.embedding import pooling_call
from pdserve.cluster.gateway.parameters import Limits, Parameters, service_class_of, tenant_of
from pdserve.cluster.gateway.prompts import token_prompt
from pdserve.cluster.rpc.requests import call_id
from pdserve.config import GatewayConfig
from pdserve.errors import InvalidField
from pdserve.prompt_tasks import Pooling, PoolingKind
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.vllm import engine_pb2 as vllm

_SAME = (
    *("top_k", "min_p", "frequency_penalty", "presence_penalty", "min_tokens"),
    *("skip_special_tokens", "ignore_eos", "include_stop_str_in_output"),
)
"""Fields of ``SamplingParams`` without presence whose 0 says nothing, or what it says here too."""

_ONE_IF_ZERO = ("top_p", "repetition_penalty", "n")
_OPTIONAL = ("temperature", "logprobs", "seed", "prompt_logprobs")
_CONSTRAINTS = {"json_schema": "json", "regex": "regex", "grammar": "grammar"}


def request_of(request: vllm.GenerateRequest, context_tokens: int) -> pb.GenerateRequest:
    """
    Raises:
        InvalidField: something is asked for that this service does not do.
    """
    if request.kv_transfer_params_json:
        raise InvalidField("kv_transfer_params_json", "is another engine's hand-off; leave it out")
    if request.data_parallel_rank:
        raise InvalidField("data_parallel_rank", "must be 0 or absent: the router chooses")
    ours = pb.GenerateRequest(id=request.request_id)
    _set_prompt(ours, request)
    said = request.sampling_params
    parameters = ours.parameters
    for name in _SAME:
        setattr(parameters, name, getattr(said, name))
    for name in _ONE_IF_ZERO:
        setattr(parameters, name, getattr(said, name) or 1)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(said, name) < 0:
            raise InvalidField(name, "must be 0 or more: those of all are too many")
    for name in _OPTIONAL:
        if said.HasField(name):
            setattr(parameters, name, getattr(said, name))
    parameters.max_tokens = said.max_tokens if said.HasField("max_tokens") else context_tokens
    parameters.stop.extend(said.stop)
    parameters.stop_token_ids.extend(said.stop_token_ids)
    if any(token < 0 for token in said.logit_bias):
        raise InvalidField("logit_bias", "has a token id that is negative")
    parameters.logit_bias.update(said.logit_bias)
    if said.HasField("truncate_prompt_tokens"):
        raise InvalidField("truncate_prompt_tokens", "is not done by this service; leave it out")
    _constrain(parameters, said)
    return ours


async def embed_call(
    session: Session,
    config: GatewayConfig,
    request: vllm.EmbedRequest,
    timeout_s: float | None,
    tenant: str | None,
) -> Call:
    limits = Limits(session.context_tokens, session.tokenizer.vocab_size, config.n_max)
    timeout_s = config.request_timeout_s if timeout_s is None else timeout_s
    return pooling_call(
        call_id(request.request_id),
        token_prompt(session, request.tokenized.input_ids, field="tokenized.input_ids"),
        Pooling(PoolingKind(config.pooling)),
        limits,
        prompt_field="tokenized.input_ids",
        tenant=tenant_of(None) if tenant is None else tenant,
        service_class=service_class_of(Parameters()),
        deadline_unix_ms=steady_unix_ms() + round(timeout_s * 1000),
        model=session.model_name,
    )


def _set_prompt(ours: pb.GenerateRequest, request: vllm.GenerateRequest) -> None:
    match request.WhichOneof("input"):
        case "tokenized":
            ours.token_ids.ids.extend(request.tokenized.input_ids)
        case "text":
            ours.text = request.text
        case _:
            raise InvalidField("input", "is missing; send tokenized or text")


def _constrain(parameters: pb.Parameters, said: vllm.SamplingParams) -> None:
    kind = said.WhichOneof("constraint")
    if kind is None:
        return
    if kind == "choice":
        parameters.constraint.choice.texts.extend(said.choice.choices)
    elif kind == "json_object":
        parameters.constraint.json_object = said.json_object
    elif kind in _CONSTRAINTS:
        setattr(parameters.constraint, _CONSTRAINTS[kind], getattr(said, kind))
    else:
        raise InvalidField(kind, "is not done by this service; take json_schema or grammar")
