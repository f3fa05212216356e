"""From settings to a draft model that fits the model it drafts for."""

import dataclasses
import logging

from pdserve.clock import Clock, monotonic
from pdserve.config import ModelConfig
from pdserve.decode.draft_model import DraftModel
from pdserve.errors import ConfigError
from pdserve.model.load import load_runner
from pdserve.model.runner import ModelRunner
from pdserve.model.source import locate
from pdserve.text.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)


def load_draft_model(
    source: str,
    config: ModelConfig,
    target: ModelRunner,
    tokenizer: Tokenizer,
    *,
    threads: int,
    running_max: int,
    clock: Clock = monotonic,
) -> DraftModel:
    """The model at ``source``, computed as ``config`` says of ``target``, with as many KV blocks.

    Args:
        tokenizer: the target's.
        threads, running_max: the target's too, as ``load_runner`` takes them.

    Raises:
        ConfigError: there is no such model, or its tokens are not the target's; nothing of it was
            loaded.
    """
    draft = dataclasses.replace(
        config,
        source=source,
        revision=None,
        stored_as="any",
        served_name=None,
        context_tokens=None,
        adapters={},
    )
    try:
        files = locate(draft)
    except ConfigError as error:
        raise ConfigError(f"draft_model: {error}") from error
    _check_tokens(source, load_tokenizer(files.path), tokenizer)
    runner = load_runner(
        draft,
        block_count=target.pool.block_count,
        pool_bytes=0,
        threads=threads,
        running_max=running_max,
    )
    pool_mib = runner.pool.tensor.nbytes >> 20
    _log.info("drafts come from %s, whose KV blocks take %d MiB", files.name, pool_mib)
    return DraftModel(runner, vocab_size=target.architecture.vocab_size, clock=clock)


def _check_tokens(source: str, drafts: Tokenizer, target: Tokenizer) -> None:
    """Every token means the same to both."""
    counts = (drafts.vocab_size, target.vocab_size)
    for token in range(max(counts)):
        said, means = drafts.token_bytes(token), target.token_bytes(token)
        if said != means:
            raise ConfigError(
                f"draft_model is {source}, whose token {token} is {said!r}; to the model that it "
                f"drafts for it is {means!r} ({counts[0]} and {counts[1]} tokens): take a smaller "
                "model of the same family"
            )
