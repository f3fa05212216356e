"""Files and batches of one gateway, put together."""

from fastapi import FastAPI

from pdserve.cluster.http.batches.asking import Endpoints
from pdserve.cluster.http.batches.files import Files, documents_of
from pdserve.cluster.http.batches.routes import add_batches, add_files
from pdserve.cluster.http.batches.running import Batches
from pdserve.config import GatewayConfig


def add_batch_api(app: FastAPI, endpoints: Endpoints, config: GatewayConfig) -> Batches:
    """The routes, and who does the work, which whoever runs the application starts and closes."""
    documents = documents_of(config)
    files = Files(documents, config)
    batches = Batches(documents, files, endpoints, app.state.metrics, config)
    add_files(app, files, config)
    add_batches(app, files, documents, batches, config)
    return batches
