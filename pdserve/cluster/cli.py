"""The command line: ``pdserve serve | chat | status | top | doctor``.

Nothing heavy is imported up here: ``pdserve --help`` loads neither Ray nor torch.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pdserve.errors import ConfigError, PdserveError

app = typer.Typer(
    help="Serves large language models from separate prefill and decode pools.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option(help="Where the gateway listens.")]


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A directory, a GGUF file, a hub id, or a CONFIG.yaml. Default: SmolLM2."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    http_port: Annotated[int | None, typer.Option("--http-port", "--port")] = None,
    grpc_port: Annotated[int | None, typer.Option()] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting: part.field=value.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; default: one of our own.")
    ] = None,
    first_chat: Annotated[bool, typer.Option(help="Send one chat and show its timing.")] = True,
) -> None:
    """Start a cluster and serve until Ctrl-C."""
    from pdserve.cluster.serve_command import run

    flags: dict[str, Any] = {
        "model.dtype": dtype,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "gateway.host": host,
        "gateway.http_port": http_port,
        "gateway.grpc_port": grpc_port,
    }
    run(_config(model, flags, assignments or []), ray_address=address, first_chat=first_chat)


@app.command()
def chat(
    message: Annotated[
        str | None, typer.Argument(help="One message; without it, a dialogue.")
    ] = None,
    url: Url = DEFAULT_URL,
    temperature: Annotated[float, typer.Option()] = 0.0,
    max_tokens: Annotated[int, typer.Option()] = 512,
) -> None:
    """Talk to a running cluster."""
    from pdserve.cluster.chat_command import dialogue

    dialogue(url, message, temperature=temperature, max_tokens=max_tokens)


@app.command()
def status(
    url: Url = DEFAULT_URL, as_json: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """Show workers, queues and counters once."""
    from pdserve.cluster.status_command import fetch, render

    snapshot = fetch(url)
    if as_json:
        print(json.dumps(snapshot, indent=2))
    else:
        from rich.console import Console

        Console().print(render(snapshot))


@app.command()
def top(url: Url = DEFAULT_URL, every_s: Annotated[float, typer.Option()] = 0.5) -> None:
    """Show the same, live, until Ctrl-C."""
    from pdserve.cluster.status_command import watch

    watch(url, every_s=every_s)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="As for serve.")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Look for what would keep a cluster from running well here, and say what to do."""
    from pdserve.cluster.doctor_command import examine

    raise typer.Exit(code=0 if examine(_config(model, {}, assignments or [])) else 1)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    print(installed("pdserve"))


def _config(model: str | None, flags: dict[str, Any], assignments: list[str]) -> Any:
    from pdserve.config import load

    file = Path(model) if model is not None and model.endswith((".yaml", ".yml")) else None
    given = [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    if model is not None and file is None:
        given.insert(0, f"model.source={json.dumps(model)}")
    return load(file, assignments=[*given, *assignments])


def main() -> None:
    try:
        app()
    except ConfigError as error:
        print(f"pdserve: {error}", file=sys.stderr)
        sys.exit(2)
    except PdserveError as error:
        print(f"pdserve: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
