"""``pdserve serve``: start, prove that it works with one real chat, say what to try, serve."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pdserve.cluster.commands.bars import spinner
from pdserve.cluster.commands.chat import ask
from pdserve.cluster.commands.splitting import check_parts
from pdserve.cluster.http_client import KEY_VARIABLE, get_json
from pdserve.cluster.local import LocalCluster, interrupt_once, local_cluster
from pdserve.config import ClusterConfig

START_S_TYPICAL = 20
FIRST_CHAT = "What is the capital of France, and what is it known for?"
FIRST_CHAT_TOKENS = 64
HELLO = {"messages": [{"role": "user", "content": "Hello!"}]}


def run(
    config: ClusterConfig,
    *,
    ray_address: str | None,
    first_chat: bool,
    notes: Sequence[str] = (),
) -> None:
    """``notes``: what is to be said first, a line each."""
    console = Console(highlight=False)
    begun = time.monotonic()
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)

    def progress(what: str) -> None:
        console.print(f"[dim]{time.monotonic() - begun:5.1f} s[/]  {what} …")

    workers = f"{config.prefill.replicas} prefill and {config.decode.replicas} decode workers"
    if config.router.mode == "aggregated":
        workers = f"{config.decode.replicas} workers that do both"
    if config.models:
        workers += f", and as many further ones as {', '.join(config.models)} say"
    console.print(
        f"pdserve: {config.model.source}, {workers}; the first start takes about "
        f"{START_S_TYPICAL} s on two cores"
    )
    if ray_address is None:  # elsewhere the model's files may not be here
        check_parts(config)
    interrupt_once()
    try:
        with contextlib.ExitStack() as ending:
            with spinner("starting", console):
                starting = local_cluster(config, progress=progress, ray_address=ray_address)
                cluster = ending.enter_context(starting)
            progress("ready")
            if config.gateway.api_keys is not None and KEY_VARIABLE not in os.environ:
                console.print(f"Whoever asks needs a key, our commands too ({KEY_VARIABLE}=…).")
                console.print("Ctrl-C stops everything.")
            else:
                if first_chat and cluster.http:
                    _show_first_chat(console, cluster, begun)
                _show_next(console, cluster)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        console.print("stopped; nothing is left behind")


def _show_first_chat(console: Console, cluster: LocalCluster, begun: float) -> None:
    console.print(f"\n[bold]you[/]      {FIRST_CHAT}")
    console.print("[bold]model[/]    ", end="")
    messages = [{"role": "user", "content": FIRST_CHAT}]
    answer = ask(cluster.http, messages, temperature=0.0, max_tokens=FIRST_CHAT_TOKENS)
    timing = answer.timing
    console.print(
        f"\n[dim]queue {timing.get('queue_ms', 0):.1f} ms · prefill "
        f"{timing.get('prefill_ms', 0):.1f} ms ({timing.get('prefill_worker', '?')}) · hand-off "
        f"{timing.get('handoff_ms', 0):.1f} ms ({timing.get('decode_worker', '?')}) · first token "
        f"{answer.first_token_ms:.0f} ms · {answer.tokens_per_s:.0f} tokens/s · "
        f"{time.monotonic() - begun:.1f} s since the start[/]"
    )


def _show_next(console: Console, cluster: LocalCluster) -> None:
    lines = ["", "Try next:"]
    here = Path(os.path.relpath(sys.executable)).parent
    if cluster.http:
        model = get_json(cluster.http, "/v1/models")["data"][0]["id"]
        program = (
            f"import openai; c = openai.OpenAI(base_url='{cluster.http}/v1', api_key='-'); "
            f"print(c.completions.create(model='{model}', prompt='Hello').choices[0].text)"
        )
        lines += [
            f"  curl {cluster.http}/v1/chat/completions -H 'content-type: application/json' \\",
            f"       -d '{json.dumps(HELLO)}'",
            f'  python -c "{program}"',
            f"  {here / 'pdserve'} chat --url {cluster.http}",
            f"  {here / 'pdserve'} top --url {cluster.http}",
        ]
    if cluster.grpc:
        lines.append(
            f"  grpcurl -plaintext -d '{json.dumps(HELLO)}' {cluster.grpc} "
            "pdserve.v1.Inference/Chat"
        )
    lines.append("Ctrl-C stops everything.")
    console.print("\n".join(lines), markup=False, soft_wrap=True)
