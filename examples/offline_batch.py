"""Many prompts through a cluster that lives as long as this program.

    python examples/offline_batch.py [MODEL]

With PDSERVE_GRPC=host:port, through one that runs already.
"""

import os
import sys

from pdserve import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Two and two make", "The sea is"]


def main() -> None:
    address = os.environ.get("PDSERVE_GRPC")
    model = sys.argv[1] if len(sys.argv) > 1 else None
    with LLM(model, address=address) as llm:
        answers = llm.generate(PROMPTS, SamplingParams(max_tokens=16, temperature=0))
        for answer in answers:
            print(f"{answer.prompt!r} → {answer.outputs[0].text!r}")


if __name__ == "__main__":
    main()
