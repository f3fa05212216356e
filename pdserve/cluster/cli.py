"""The command line: ``pdserve serve | deploy | chat | status | top | doctor | chaos | keys |
config | autoscaler | role | kv | support-bundle``, once ``compile`` and ``completion``; for
planning ``profile | record | simulate | plan``.

Nothing heavy is imported up here: ``pdserve --help`` loads neither Ray nor torch.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pdserve.cluster.commands.autoscaler_cli import app as autoscaler_app
from pdserve.cluster.commands.config import app as config_app
from pdserve.cluster.commands.helping_cli import completion, support_bundle
from pdserve.cluster.commands.keys import app as keys_app
from pdserve.cluster.commands.kv_cli import DEFAULT_URL, OfModel, Url, kv
from pdserve.cluster.commands.vllm_flags import NOTES, ServeCommand
from pdserve.errors import ConfigError, PdserveError

app = typer.Typer(
    help="Serves large language models from separate prefill and decode pools.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its help costs twice the time, most of it for Markdown
)


@app.command(cls=ServeCommand)
def serve(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A directory, a GGUF file, a hub id, or a CONFIG.yaml. Default: SmolLM2."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Of the weights: auto, none, file, int8, int4 or fp8.")
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    http_port: Annotated[int | None, typer.Option("--http-port", "--port")] = None,
    grpc_port: Annotated[int | None, typer.Option()] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting: part.field=value.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="One more model beside it, under this name."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; default: one of our own.")
    ] = None,
    first_chat: Annotated[bool, typer.Option(help="Send one chat and show its timing.")] = True,
) -> None:
    """Start a cluster and serve until Ctrl-C. Takes the flags of vllm serve, too."""
    from pdserve.cluster.commands.serve import run

    flags: dict[str, Any] = {
        "model.dtype": dtype,
        "model.quantization": quantization,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "gateway.host": host,
        "gateway.http_port": http_port,
        "gateway.grpc_port": grpc_port,
    }
    run(
        _config(model, flags, assignments or [], also=also or ()),
        ray_address=address,
        first_chat=first_chat,
        notes=context.meta[NOTES],
    )


@app.command()
def deploy(
    config: Annotated[str, typer.Argument(help="A CONFIG.yaml, with all models.")],
    address: Annotated[str, typer.Option(help="The Ray cluster's.")] = "auto",
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting: part.field=value.")
    ] = None,
) -> None:
    """Put it on a running Ray cluster, or change what runs there; what stays as it is goes on."""
    from pdserve.cluster.commands.deploy import deploy as put

    put(_config(config, {}, assignments or []), ray_address=address)


@app.command()
def chat(
    message: Annotated[
        str | None, typer.Argument(help="One message; without it, a dialogue.")
    ] = None,
    url: Url = DEFAULT_URL,
    temperature: Annotated[float, typer.Option()] = 0.0,
    max_tokens: Annotated[int, typer.Option()] = 512,
    model: OfModel = None,
) -> None:
    """Talk to a running cluster."""
    from pdserve.cluster.commands.chat import dialogue

    dialogue(url, message, temperature=temperature, max_tokens=max_tokens, model=model)


@app.command()
def status(
    url: Url = DEFAULT_URL,
    model: OfModel = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Show workers, queues and counters once."""
    from pdserve.cluster.commands.status import fetch, render

    snapshot = fetch(url, model)
    if as_json:
        print(json.dumps(snapshot, indent=2))
    else:
        from rich.console import Console

        Console().print(render(snapshot))


@app.command()
def top(url: Url = DEFAULT_URL, every_s: Annotated[float, typer.Option()] = 0.5) -> None:
    """Show rates, KV stores, workers and queues, live, until Ctrl-C."""
    from pdserve.cluster.commands.top import watch

    watch(url, every_s=every_s)


@app.command()
def role(
    worker: Annotated[str, typer.Argument(help="As `pdserve status` names it.")],
    duty: Annotated[
        str, typer.Argument(metavar="ROLE", help="prefill, decode, both, or none: drain it.")
    ],
    url: Url = DEFAULT_URL,
) -> None:
    """Give a running worker another role, or none; what it has of the former one moves."""
    from pdserve.cluster.http_client import post_json

    said = post_json(url, "/cluster/role", {"worker": worker, "role": duty})
    print(f"{said['worker']}: {said['role']} from now on")


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="As for serve.")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Look for what would keep a cluster from running well here, and say what to do."""
    from pdserve.cluster.commands.doctor import examine

    raise typer.Exit(code=0 if examine(_config(model, {}, assignments or [])) else 1)


app.add_typer(autoscaler_app, name="autoscaler")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")

Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting: part.field=value.")
]


@app.command(name="compile")
def compile_() -> None:
    """Compile router, simulator and CPU kernels for this machine, once: about a minute."""
    from pdserve.cluster.commands.compile import compile_and_tell

    compile_and_tell()


@app.command()
def profile(
    model: Annotated[str | None, typer.Argument(help="As for serve.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the profile goes.")] = None,
    neighbours: Annotated[
        int, typer.Option(min=0, help="Also beside so many other workers on this machine.")
    ] = 0,
    assignments: Assignments = None,
) -> None:
    """Measure what prefills, steps and moves cost here; up to two minutes."""
    from pdserve.cluster.commands.profile import profile as measure

    measure(_config(model, {}, assignments or []), out=out, neighbours=neighbours)


@app.command()
def record(
    file: Annotated[Path, typer.Argument(help="A new file; lengths and times, never text.")],
    url: Url = DEFAULT_URL,
    seconds: Annotated[float | None, typer.Option(help="Default: until Ctrl-C.")] = None,
    model: OfModel = None,
) -> None:
    """Record what arrives at a running cluster, as a trace to simulate."""
    from pdserve.cluster.commands.record import record as fetch

    fetch(url, file, seconds=seconds, model=model)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="Mooncake, Azure, BurstGPT, or our recording.")],
    config: Annotated[str | None, typer.Option(help="A CONFIG.yaml.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Compare these router policies.")] = None,
    speed: Annotated[list[float] | None, typer.Option(help="How many times as fast.")] = None,
    requests: Annotated[int | None, typer.Option(help="So many, repeating if need be.")] = None,
    hosts: Annotated[int, typer.Option(help="That the workers are spread over.")] = 1,
    seed: Annotated[int, typer.Option()] = 0,
    ttft_ms: Annotated[float, typer.Option(help="Goal, for goodput.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="Goal, for goodput.")] = 100.0,
    fail: Annotated[
        list[str] | None,
        typer.Option(help="prefill:0@30, prefill:0@30+20, decode:1x4@60: see docs."),
    ] = None,
    noise: Annotated[float, typer.Option(help="Of prefill times: sigma of the logarithm.")] = 0.0,
    autoscale: Annotated[
        bool, typer.Option("--autoscale", help="Up to replicas_max; beside pools of equal cost.")
    ] = False,
    start_s: Annotated[
        float | None, typer.Option(help="Until a worker that is started serves.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    html_file: Annotated[Path | None, typer.Option("--html")] = None,
    assignments: Assignments = None,
) -> None:
    """Play a trace through the production router, without a model, and show what it would do."""
    from pdserve.cluster.commands.simulate import Wish, run_simulations

    wish = Wish(
        policies=tuple(policy or ()),
        speeds=tuple(speed or (1.0,)),
        requests=requests,
        hosts=hosts,
        seed=seed,
        ttft_goal_ms=ttft_ms,
        tpot_goal_ms=tpot_ms,
        failures=tuple(fail or ()),
        noise_sigma=noise,
        autoscale=autoscale,
        start_s=start_s,
    )
    settings = _config(config, {}, assignments or [])
    run_simulations(trace, settings, wish, json_file=json_file, html_file=html_file)


@app.command()
def plan(
    trace: Annotated[Path, typer.Argument(help="As for simulate.")],
    slo: Annotated[str, typer.Option(help="ttft=500ms,tpot=50ms, or one of the two.")],
    config: Annotated[str | None, typer.Option(help="A CONFIG.yaml.")] = None,
    profile_name: Annotated[
        str | None, typer.Option("--profile", help="A file, or a shipped profile's name.")
    ] = None,
    workers_max: Annotated[int, typer.Option()] = 64,
    attainment: Annotated[float, typer.Option(help="Part within the objectives.")] = 0.9,
    prefill_cost: Annotated[float, typer.Option(help="Of one prefill worker.")] = 1.0,
    decode_cost: Annotated[float, typer.Option(help="Of one decode worker.")] = 1.0,
    speed: Annotated[float, typer.Option(help="How many times as fast.")] = 1.0,
    requests: Annotated[int, typer.Option(help="The first so many of the trace.")] = 20_000,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    assignments: Assignments = None,
) -> None:
    """Find the cheapest pools that keep the objectives on a trace."""
    from pdserve.cluster.commands.plan import plan as search

    held = search(
        trace,
        slo=slo,
        config=_config(config, {}, assignments or []),
        profile=profile_name,
        workers_max=workers_max,
        attainment=attainment,
        prefill_cost=prefill_cost,
        decode_cost=decode_cost,
        speed=speed,
        requests_max=requests,
        as_json=as_json,
    )
    raise typer.Exit(code=0 if held else 1)


@app.command()
def chaos(
    seed: Annotated[int, typer.Option(help="Repeats the plan.")] = 0,
    seconds: Annotated[float, typer.Option(help="Of load under faults.")] = 60.0,
    faults: Annotated[
        str, typer.Option(help="Of kill, stop, corrupt, shm, disk; with commas.")
    ] = "kill,stop",
    local: Annotated[bool, typer.Option("--local", help="A cluster of its own.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it to the cluster behind --url.")] = False,
    url: Url = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="As for serve; with --local.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Strike a running cluster at random, under load, and check every token of every answer."""
    from pdserve.cluster.commands.chaos import chaos as strike

    good = strike(
        _config(model, {}, assignments or []),
        url=url,
        seed=seed,
        seconds=seconds,
        kinds=[kind.strip() for kind in faults.split(",") if kind.strip()],
        local=local,
        allowed=yes,
        json_file=json_file,
    )
    raise typer.Exit(code=0 if good else 1)


app.add_typer(kv, name="kv")
app.command()(completion)
app.command(name="support-bundle")(support_bundle)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    print(installed("pdserve"))


def _config(
    model: str | None, flags: dict[str, Any], assignments: list[str], *, also: Sequence[str] = ()
) -> Any:
    from pdserve.settings import load

    file = Path(model) if model is not None and model.endswith((".yaml", ".yml")) else None
    given = [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    if model is not None and file is None:
        given.insert(0, f"model.source={json.dumps(model)}")
    return load(file, assignments=[*given, *assignments], also=also)


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
