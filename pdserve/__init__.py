"""pdserve: large language models from separate prefill and decode pools on Ray.

The modules beside this one are the vocabulary that all folders share: ids, clock, errors,
lifecycle, messages, config. Start with ``messages``: it is the flow, as types; ``compiled`` says
why there is code below.
"""

from pdserve.compiled import prefer_compiled

prefer_compiled(__path__)
