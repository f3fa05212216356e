"""pdserve: large language models from separate prefill and decode pools on Ray.

The modules beside this one are the vocabulary that all folders share: ids, clock, errors,
lifecycle, messages, config. Start with ``messages``: it is the flow, as types; ``compiled`` says
why there is code below.
"""

import importlib
from typing import Any

from pdserve.compiled import prefer_compiled

prefer_compiled(__path__)

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """What programs import from here. Nothing of it is loaded before that, nor looked at by a
    compiler that follows imports."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("pdserve.cluster.offline"), name)
