"""Triton's client over gRPC: metadata, a whole answer, a stream of two, a refusal."""

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

URL, MODEL = sys.argv[1:]
WAIT_S = 60


def text(value: str) -> triton.InferInput:
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode()], dtype=object))
    return tensor


def whole_number(name: str, value: int) -> triton.InferInput:
    tensor = triton.InferInput(name, [1], "INT32")
    tensor.set_data_from_numpy(np.array([value], dtype=np.int32))
    return tensor


def real(name: str, value: float) -> triton.InferInput:
    tensor = triton.InferInput(name, [1], "FP32")
    tensor.set_data_from_numpy(np.array([value], dtype=np.float32))
    return tensor


def yes(name: str) -> triton.InferInput:
    tensor = triton.InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([True]))
    return tensor


def greedy(prompt: str) -> list[triton.InferInput]:
    return [text(prompt), whole_number("max_tokens", 12), real("temperature", 0.0)]


def said(result: Any) -> str:
    value: bytes = result.as_numpy("text_output")[0]
    return value.decode()


def refused(client: triton.InferenceServerClient) -> tuple[str, bool] | None:
    try:
        client.infer(MODEL, [text("hi"), whole_number("max_tokens", -1)])
    except InferenceServerException as error:
        return str(error.status()), "max_tokens" in error.message()
    return None


with triton.InferenceServerClient(URL) as client:
    about = client.get_model_metadata(MODEL, as_json=True)
    told = {
        "live": client.is_server_live(),
        "ready": client.is_model_ready(MODEL),
        "inputs": any(tensor["name"] == "text_input" for tensor in about["inputs"]),
        "config": client.get_model_config(MODEL, as_json=True)["config"]["name"] == MODEL,
        "whole": said(client.infer(MODEL, greedy("hi"))),
        "refused": refused(client),
    }
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer(
        MODEL, [*greedy("hi"), yes("stream")], enable_empty_final_response=True
    )
    parts = []
    while True:
        result, error = answers.get(timeout=WAIT_S)
        if error is not None:
            raise error
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
        parts.append(said(result))
    client.stop_stream()
    told["streamed"] = "".join(parts)
print(json.dumps(told))
