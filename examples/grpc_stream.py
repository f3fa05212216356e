"""Tokens over gRPC, with the router's reasons. PDSERVE_GRPC says where the gateway is."""

import os

import grpc

from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceStub


def main() -> None:
    with grpc.insecure_channel(os.environ.get("PDSERVE_GRPC", "127.0.0.1:50051")) as channel:
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        request = pb.GenerateRequest(
            text="Once upon a time", parameters=pb.Parameters(max_tokens=24), why=True
        )
        for chunk in stub.Generate(request, timeout=60):
            print(chunk.text, end="", flush=True)
            for decision in chunk.timing.decisions:
                print(f"\n[{decision.reason}: {decision.prefill_worker}]")


if __name__ == "__main__":
    main()
