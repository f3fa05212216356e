"""``pdserve deploy``: a cluster's settings, put on a Ray cluster that runs, and left there.

Like ``serve deploy``, but for what stays: there any change of ``args`` replaces every process. Here
a deployment whose settings are what they were goes on, so a model can come or go beside others that
are answering (``app.build``).
"""

import os
from contextlib import ExitStack

from rich.console import Console

from pdserve.cluster.commands.bars import spinner
from pdserve.cluster.commands.splitting import check_parts
from pdserve.cluster.local import APP, application_started
from pdserve.config import ClusterConfig


def deploy(config: ClusterConfig, *, ray_address: str) -> None:
    """Returns when everything runs.

    Raises:
        ConfigError: something does not start; the message carries its own words.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray
    from ray import serve

    console = Console(highlight=False)
    check_parts(config)
    with ExitStack() as ending:
        ending.enter_context(spinner("starting what is new", console))
        if not ray.is_initialized():
            ray.init(address=ray_address, log_to_driver=False)
            ending.callback(ray.shutdown)
        serve.start(proxy_location="Disabled")  # where Serve runs already, as it is
        ports = application_started(config)
    models = ", ".join([config.model.served_name or config.model.source, *config.models])
    console.print(f"{APP} serves {models}, at {ports}", markup=False)
