"""A cluster whose decode workers have a draft model: the tokens are those of a cluster without."""

from pathlib import Path

import pytest

from tests.integration.harness import random_prompts, running, settings, storm
from tests.models.small import write_small_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STREAMS, OUTPUT_TOKENS = 4, 40


def test_a_draft_model_changes_no_token(
    small_model: Path, default_model: Path, tmp_path: Path
) -> None:
    stranger = write_small_model(tmp_path / "draft", tokenizer_from=default_model, seed=5, layers=1)
    prompts = random_prompts(STREAMS, seed=3, length=60)
    answers = []
    for drafts in ({}, {"speculation": "draft_model", "draft_model": str(stranger)}):
        config = settings(small_model, model={"dtype": "float32"}, decode=drafts)
        with running(config) as cluster:
            streams = storm(cluster, prompts, OUTPUT_TOKENS)
            assert [stream.error for stream in streams] == [None] * STREAMS
            answers.append([stream.tokens for stream in streams])
            assert (cluster.counter("decode", "tokens_drafted") > 0) == bool(drafts)
    assert answers[0] == answers[1]
    assert all(len(tokens) == OUTPUT_TOKENS for tokens in answers[0])
