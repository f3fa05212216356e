"""A draft model is loaded if it fits, and refused with the reason if it does not."""

from functools import partial
from pathlib import Path

import pytest

from pdserve.config import ModelConfig, PoolConfig
from pdserve.decode.draft_loading import load_draft_model
from pdserve.errors import ConfigError
from pdserve.model.load import load_runner
from pdserve.text.tokenizer import load_tokenizer
from tests.unit.engine.rig import TOKENIZER
from tests.unit.model.conftest import _compiled, one_thread

__all__ = ["_compiled", "one_thread"]


def test_one_with_the_same_tokens_is_loaded_and_others_are_refused(small_model: Path) -> None:
    config = ModelConfig(source=str(small_model), dtype="float32")
    target = load_runner(config, block_count=8, pool_bytes=0, threads=1)
    tokenizer = load_tokenizer(small_model)
    load = partial(load_draft_model, threads=1, running_max=4)
    drafts = load(str(small_model), config, target, tokenizer)
    assert drafts.free_count == 8
    assert len(drafts.begin().draft([5, 6, 7], 3)) == 3
    with pytest.raises(ConfigError, match=r"whose token 0 is .*: take a smaller model of the same"):
        load(str(small_model), config, target, TOKENIZER)
    with pytest.raises(ConfigError, match=r"draft_model: .*no such file or directory"):
        load("./none", config, target, tokenizer)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"speculation": "draft_model"}, "draft_model names none"),
        ({"draft_model": "m"}, "set speculation to draft_model"),
        (
            {"speculation": "draft_model", "draft_model": "m", "tensor_parallel": 2},
            "take prompt_lookup",
        ),
        ({"speculation": "draft_model", "draft_model": "m", "step_ahead": True}, "take one of the"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    settings: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        PoolConfig(**settings)  # type: ignore[arg-type]
