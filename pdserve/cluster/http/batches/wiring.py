"""Files and batches of one gateway, put together."""

from fastapi import FastAPI

from pdserve.cluster.http.asking import chat_asked, completion_asked
from pdserve.cluster.http.batches.files import Files, documents_of
from pdserve.cluster.http.batches.routes import add_batches, add_files
from pdserve.cluster.http.batches.running import Batches
from pdserve.cluster.http.embeddings import Embeddings
from pdserve.cluster.http.generation import Generation
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.http.responses.routes import Creation
from pdserve.cluster.models import Models
from pdserve.config import GatewayConfig


def add_batch_api(app: FastAPI, models: Models, config: GatewayConfig) -> Batches:
    """The routes, and who does the work, which whoever runs the application starts and closes."""
    metrics: FrontMetrics = app.state.metrics
    endpoints = {
        "/v1/chat/completions": lambda: Generation(
            models, config, metrics, operation="chat", ask=chat_asked
        ),
        "/v1/completions": lambda: Generation(
            models, config, metrics, operation="completion", ask=completion_asked
        ),
        "/v1/embeddings": lambda: Embeddings(models, config, metrics),
        "/v1/responses": lambda: Creation(models, config, metrics, app.state.responses),
    }
    documents = documents_of(config)
    files = Files(documents, config)
    batches = Batches(documents, files, endpoints, metrics, config)
    add_files(app, files, config)
    add_batches(app, files, documents, batches, config)
    return batches
