"""Tensors in, our own messages out, the same whichever way they are sent; errors name a tensor."""

import contextlib
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.rpc.kserve_requests import response_of, wanted_of
from pdserve.cluster.rpc.tensors import inputs_of, raw_strings
from pdserve.errors import InvalidField
from pdserve.proto.kserve import inference_pb2 as kserve

INTEGERS = {
    "INT32": ("int_contents", "i", st.integers(-(2**31), 2**31 - 1)),
    "INT64": ("int64_contents", "q", st.integers(-(2**63), 2**63 - 1)),
    "UINT32": ("uint_contents", "I", st.integers(0, 2**32 - 1)),
    "UINT64": ("uint64_contents", "Q", st.integers(0, 2**64 - 1)),
    "BOOL": ("bool_contents", "?", st.booleans()),
    "FP64": ("fp64_contents", "d", st.floats(allow_nan=False)),
}


def asked(**tensors: Any) -> kserve.ModelInferRequest:
    """Text is BYTES, whole numbers INT32, booleans BOOL, numbers FP32; lists have more values."""
    request = kserve.ModelInferRequest(model_name="m")
    for name, value in tensors.items():
        values = value if isinstance(value, list) else [value]
        tensor = request.inputs.add(name=name, shape=[len(values)])
        contents = tensor.contents
        match values[0]:
            case bool():
                tensor.datatype = "BOOL"
                contents.bool_contents.extend(values)
            case int():
                tensor.datatype = "INT32"
                contents.int_contents.extend(values)
            case float():
                tensor.datatype = "FP32"
                contents.fp32_contents.extend(values)
            case _:
                tensor.datatype = "BYTES"
                contents.bytes_contents.extend(text.encode() for text in values)
    return request


@given(data=st.data(), datatype=st.sampled_from(sorted(INTEGERS)))
def test_raw_values_are_those_of_contents(data: st.DataObject, datatype: str) -> None:
    field, code, values_of = INTEGERS[datatype]
    values = data.draw(st.lists(values_of, max_size=20))
    plain = kserve.ModelInferRequest()
    tensor = plain.inputs.add(name="x", datatype=datatype, shape=[len(values), 1])
    raw = kserve.ModelInferRequest()
    raw.inputs.add().CopyFrom(tensor)
    getattr(tensor.contents, field).extend(values)
    raw.raw_input_contents.append(struct.pack(f"<{len(values)}{code}", *values))
    assert list(inputs_of(plain)["x"]) == list(inputs_of(raw)["x"]) == values


@given(st.lists(st.text(), max_size=10))
def test_raw_strings_come_back(strings: list[str]) -> None:
    request = kserve.ModelInferRequest(raw_input_contents=[raw_strings(strings)])
    request.inputs.add(name="x", datatype="BYTES", shape=[len(strings)])
    assert [text.decode() for text in inputs_of(request)["x"]] == strings


@given(st.binary(max_size=64), st.sampled_from(["BYTES", "INT32", "BOOL", "FP64", "", "X"]))
def test_any_bytes_are_values_or_a_typed_error(raw: bytes, datatype: str) -> None:
    request = kserve.ModelInferRequest(raw_input_contents=[raw])
    request.inputs.add(name="text_input", datatype=datatype, shape=[1])
    with contextlib.suppress(InvalidField):
        wanted_of(request)


def test_parameters_come_from_three_places() -> None:
    request = asked(
        text_input="hi",
        max_tokens=9,
        temperature=0.5,
        stop=["a", "b"],
        sampling_parameters=json.dumps({"top_p": 0.25, "stop_token_ids": [1, 2], "user": "ann"}),
        stream=True,
    )
    request.parameters["seed"].int64_param = 7
    request.parameters["ignore_eos"].bool_param = True
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    wanted = wanted_of(request)
    assert (wanted.streams, wanted.final, wanted.raw) == (True, True, False)
    said = wanted.request.parameters
    assert (wanted.request.text, said.max_tokens, said.temperature) == ("hi", 9, 0.5)
    assert (list(said.stop), list(said.stop_token_ids)) == (["a", "b"], [1, 2])
    assert (said.top_p, said.user, said.seed, said.ignore_eos) == (0.25, "ann", 7, True)


def test_tokens_may_stand_for_text() -> None:
    wanted = wanted_of(asked(input_ids=[3, 4, 5]))
    assert list(wanted.request.token_ids.ids) == [3, 4, 5]


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({}, "text_input"),
        ({"text_input": "a", "input_ids": [1]}, "text_input"),
        ({"text_input": ["a", "b"]}, "text_input"),
        ({"text_input": 3}, "text_input"),
        ({"input_ids": ["a"]}, "input_ids"),
        ({"input_ids": [-1]}, "input_ids"),
        ({"text_input": "a", "max_tokens": "many"}, "max_tokens"),
        ({"text_input": "a", "max_tokens": -1}, "max_tokens"),
        ({"text_input": "a", "no_such_thing": 1}, "no_such_thing"),
        ({"text_input": "a", "logit_bias": 1}, "logit_bias"),
        ({"text_input": "a", "stream": 1}, "stream"),
        ({"text_input": "a", "sampling_parameters": "[]"}, "sampling_parameters"),
        ({"text_input": "a", "sampling_parameters": "[" * 100_000}, "sampling_parameters"),
        ({"text_input": "a", "seed": 1, "sampling_parameters": '{"seed": 2}'}, "seed"),
        ({"text_input": "a", "stop": [1]}, "stop"),
    ],
)
def test_what_is_wrong_is_named(tensors: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        wanted_of(asked(**tensors))
    assert caught.value.field == field


def test_shapes_and_names_are_checked() -> None:
    wrong_count = asked(text_input="a")
    wrong_count.inputs[0].shape[0] = 2
    negative = asked(text_input="a")
    negative.inputs[0].shape[0] = -1
    huge = asked(text_input="a")
    huge.inputs[0].shape[:] = [1 << 40, 1 << 40]
    twice = asked(text_input="a")
    twice.inputs.add().CopyFrom(twice.inputs[0])
    lacking = asked(text_input="a")
    lacking.raw_input_contents.extend([b"", b""])
    unknown = asked(text_input="a")
    unknown.outputs.add(name="logits")
    for request in (wrong_count, negative, huge, twice, lacking, unknown):
        with pytest.raises(InvalidField):
            wanted_of(request)


@pytest.mark.parametrize("raw", [False, True])
def test_outputs_are_what_was_wanted_the_way_it_was_sent(raw: bool) -> None:
    request = asked(text_input="a")
    if raw:
        request.raw_input_contents.append(raw_strings(["a"]))
        request.inputs[0].ClearField("contents")
    request.outputs.add(name="text_output")
    response = response_of(request, "m", wanted_of(request), ["x", "y"], ["stop", "stop"])
    (output,) = response.outputs
    assert (output.name, list(output.shape)) == ("text_output", [2])
    if raw:
        assert list(response.raw_output_contents) == [raw_strings(["x", "y"])]
    else:
        assert list(output.contents.bytes_contents) == [b"x", b"y"]
