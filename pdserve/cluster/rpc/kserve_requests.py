"""Between KServe's tensors and the port's own messages.

A text model takes ``text_input``, or ``input_ids``, and what else is said as tensors of one value,
as parameters of the request, or in ``sampling_parameters``, a JSON object, as Triton's and Dynamo's
backends have it. It gives ``text_output`` and ``finish_reason``, one of each per choice.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.cluster.gateway.parameters import shown
from pdserve.cluster.rpc.tensors import BYTES, inputs_of, raw_strings
from pdserve.errors import InvalidField
from pdserve.proto.kserve import inference_pb2 as kserve
from pdserve.proto.v1 import inference_pb2 as pb

TEXT, TOKENS, SAMPLING = "text_input", "input_ids", "sampling_parameters"
STREAM = ("stream", "streaming")
TEXT_OUTPUT, FINISH_REASON = "text_output", "finish_reason"
OUTPUTS = (TEXT_OUTPUT, FINISH_REASON)

FINAL_WANTED = "triton_enable_empty_final_response"
FINAL = "triton_final_response"

_TRITONS_OWN = frozenset(
    {FINAL_WANTED, "priority", "timeout", "binary_data_output"}
    | {"sequence_id", "sequence_start", "sequence_end"}
)
"""Parameters that clients of Triton send for its scheduler, which nobody here needs."""

_NOT_FLAT = frozenset({"logit_bias", "constraint", "service_class"})
"""Of ``Parameters``: those that no single value can say."""

FINISH_NAMES = {
    pb.FINISH_REASON_UNSPECIFIED: "",
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
    pb.FINISH_REASON_ERROR: "error",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a ModelInferRequest asks for."""

    request: pb.GenerateRequest
    streams: bool
    final: bool  # an empty response is to say that it was the last
    raw: bool  # values come as bytes behind the response, as they came with the request
    outputs: tuple[str, ...]


def wanted_of(request: kserve.ModelInferRequest) -> Wanted:
    """
    Raises:
        InvalidField: it is no request that a text model can answer.
    """
    inputs = inputs_of(request)
    generate = pb.GenerateRequest(model=request.model_name)
    if (TEXT in inputs) == (TOKENS in inputs):
        raise InvalidField(TEXT, f"is to be sent, or {TOKENS}, and not both")
    if TEXT in inputs:
        generate.text = _text(TEXT, _one(TEXT, inputs[TEXT]))
    else:
        _set(generate.token_ids, "ids", inputs[TOKENS], said_as=TOKENS)
    said = _said(request, inputs)
    streams = [said.pop(name) for name in STREAM if name in said]
    if any(not isinstance(value, bool) for value in streams):
        raise InvalidField("stream", "must be a boolean")
    for name, value in said.items():
        _set_parameter(generate.parameters, name, value)
    outputs = tuple(output.name for output in request.outputs) or OUTPUTS
    for index, name in enumerate(outputs):
        if name not in OUTPUTS:
            raise InvalidField(
                f"outputs.{index}.name", f"is {shown(name)}, must be one of {', '.join(OUTPUTS)}"
            )
    return Wanted(
        generate,
        streams=any(streams),
        final=request.parameters[FINAL_WANTED].bool_param
        if FINAL_WANTED in request.parameters
        else False,
        raw=bool(request.raw_input_contents),
        outputs=outputs,
    )


def response_of(
    request: kserve.ModelInferRequest,
    model: str,
    wanted: Wanted,
    texts: Sequence[str],
    finishes: Sequence[str],
) -> kserve.ModelInferResponse:
    """One value per choice in each output that is wanted."""
    response = empty_response(request, model)
    for name in wanted.outputs:
        values = texts if name == TEXT_OUTPUT else finishes
        output = response.outputs.add(name=name, datatype=BYTES, shape=[len(values)])
        if wanted.raw:
            response.raw_output_contents.append(raw_strings(values))
        else:
            output.contents.bytes_contents.extend(value.encode() for value in values)
    return response


def empty_response(request: kserve.ModelInferRequest, model: str) -> kserve.ModelInferResponse:
    return kserve.ModelInferResponse(
        model_name=request.model_name or model, model_version="1", id=request.id
    )


def _said(request: kserve.ModelInferRequest, inputs: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """All that is neither prompt nor Triton's, by name, from the three places where it may be."""
    said: dict[str, Any] = {}

    def say(name: str, value: Any) -> None:
        if name in said:
            raise InvalidField(name, "is said twice; say it once")
        said[name] = value

    for name, parameter in request.parameters.items():
        if name not in _TRITONS_OWN:
            kind = parameter.WhichOneof("parameter_choice")
            if kind is None:
                raise InvalidField(name, "has no value")
            say(name, getattr(parameter, kind))
    for name, values in inputs.items():
        if name == SAMPLING:
            for inner, value in _sampling(_text(name, _one(name, values))).items():
                say(inner, value)
        elif name not in (TEXT, TOKENS):
            listed = name in ("stop", "stop_token_ids")
            say(name, list(values) if listed else _one(name, values))
    return said


def _sampling(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidField(SAMPLING, "must be a JSON object as text")
    return found


def _set_parameter(parameters: pb.Parameters, name: str, value: Any) -> None:
    if name not in pb.Parameters.DESCRIPTOR.fields_by_name or name in _NOT_FLAT:
        raise InvalidField(name, "is no parameter of this model")
    if isinstance(value, bytes):
        value = _text(name, value)
    if name in ("stop", "stop_token_ids"):
        values = value if isinstance(value, list) else [value]
        _set(parameters, name, [_text(name, v) if isinstance(v, bytes) else v for v in values])
        return
    try:
        setattr(parameters, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidField(name, f"is {shown(value)}, which it cannot be") from error


def _set(message: Any, field: str, values: Sequence[Any], *, said_as: str = "") -> None:
    try:
        getattr(message, field).extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidField(said_as or field, "has a value that it cannot have") from error


def _one(name: str, values: Sequence[Any]) -> Any:
    if len(values) != 1:
        raise InvalidField(name, f"has {len(values)} values, must have one: there are no batches")
    return values[0]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, bytes):
        raise InvalidField(name, f"must be of datatype {BYTES}")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidField(name, "is no UTF-8") from error
