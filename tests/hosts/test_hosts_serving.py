"""Prefill, decode and gateway on three hosts that share nothing but a network."""

from pathlib import Path

import pytest

from tests.hosts.cluster import DECODE, HEAD, PREFILL, hosted, hosted_settings
from tests.hosts.namespaces import network
from tests.integration.harness import random_prompts
from tests.models.reference import reference_tokens

OUTPUT_TOKENS = 16


@pytest.mark.slow
def test_blocks_and_tokens_cross_hosts(small_model: Path, tmp_path: Path) -> None:
    prompts = [random_prompts(1, seed=length, length=length)[0] for length in (5, 33, 160, 700)]
    expected = reference_tokens(small_model, prompts, OUTPUT_TOKENS, scratch=tmp_path)
    with (
        network([HEAD, PREFILL, DECODE], seed=1) as hosts,
        hosted(hosts, hosted_settings(small_model, hosts)) as cluster,
    ):
        answers = [cluster.served.tokens(prompt, OUTPUT_TOKENS) for prompt in prompts]
        assert answers == expected
        prefill = cluster.served.workers("prefill")[0]
        decode = cluster.served.workers("decode")[0]
        assert prefill["host"] != decode["host"]
        assert prefill["counters"]["remote_bytes"] > 0
