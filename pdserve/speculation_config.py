"""What must hold between a pool's settings of drafts and its others."""

from collections.abc import Iterator


def speculation_problems(
    speculation: str, draft_model: str | None, *, step_ahead: bool, tensor_parallel: int
) -> Iterator[str]:
    """What is wrong, each with the way out. Names are those of ``PoolConfig``."""
    if step_ahead and speculation != "off":
        yield (
            f"step_ahead is on and speculation {speculation}: drafts need to know the tokens "
            "before them; take one of the two"
        )
    if speculation != "draft_model":
        if draft_model is not None:
            yield (
                f"draft_model is {draft_model} and speculation {speculation}; set speculation to "
                "draft_model, or leave draft_model out"
            )
        return
    if not draft_model:
        yield (
            "speculation is draft_model, and draft_model names none; give it a directory, a GGUF "
            "file or a hub id"
        )
    if tensor_parallel > 1:
        yield (
            f"speculation is draft_model and tensor_parallel {tensor_parallel}; a worker of "
            "several processes has no draft model: take prompt_lookup"
        )
