"""Servers to put a load on, one at a time: our cluster in several forms, and vLLM's CPU build.

A *form* says how a server is started. ``serving`` starts one as a process on a free port, waits
until it lists its model, sends it a few requests so that whatever is built on first use is there,
and ends it. All of that lies outside of what is measured.

Both sides serve the same weights in bf16, unless a form says otherwise: ours from the GGUF file,
vLLM from its conversion to a Hugging Face directory (``peers/setup.sh`` makes it). Neither can
reuse a prefix: vLLM's cache is off, and every prompt is random.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.frame import ROOT
from bench.peer_places import peer_missing, peer_model, peer_python, peers_home
from bench.peers.mixed_load import CHAT, LONG, Arrival, Target, drive

START_S_MAX = 900.0  # vLLM compiles for one to two minutes, much longer beside other work
END_S_MAX = 60.0
LOG_TAIL_CHARS = 2000
VLLM_CONTEXT_TOKENS = 4096
VLLM_KV_CACHE_GIB = 4

WARM_UP = [
    Arrival(0.0, "chat", CHAT, seed=1),
    Arrival(0.1, "long", LONG, seed=2),
    Arrival(0.2, "chat", CHAT, seed=3),
    Arrival(0.3, "chat", CHAT, seed=4),
]


class ServerFailed(Exception):
    """A server did not start, or did not answer as it must."""


@dataclass(frozen=True, slots=True)
class Ours:
    """``pdserve serve`` with one worker per pool."""

    mode: Literal["disaggregated", "aggregated", "auto"]
    policy: str
    settings: tuple[tuple[str, str], ...] = ()  # further ones, by name
    quantization: str = "none"

    @property
    def name(self) -> str:
        bits = "" if self.quantization == "none" else f", weights: {self.quantization}"
        return f"{self.mode} {self.policy}{bits}"

    @property
    def chats_first(self) -> bool:
        return False

    @property
    def options(self) -> list[str]:
        """The same for a server and for what is measured in its stead."""
        settings = {
            "router.mode": self.mode,
            "router.policy": self.policy,
            "model.dtype": "bfloat16",
            "model.quantization": self.quantization,
            **dict(self.settings),
        }
        return [f"--set={name}={value}" for name, value in settings.items()]

    def command(self, port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "pdserve.cluster.cli", "serve", "--no-first-chat"),
            *(f"--http-port={port}", "--grpc-port=-1", "--set=tcp=false", *self.options),
        ]

    def environment(self) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True, slots=True)
class Vllm:
    """vLLM's OpenAI server. The three settings are what decides between chats and long prompts."""

    budget_tokens: int | None  # of one step, chunks of prompts included; None: vLLM's default
    long_threshold_tokens: int  # a longer prompt is cut into chunks of so many; 0: it is not
    chats_first: bool  # scheduling by the priority that requests name, instead of by arrival

    @property
    def name(self) -> str:
        policy = "priority" if self.chats_first else "fcfs"
        return f"vLLM {self.budget_tokens or 'default'}/{self.long_threshold_tokens}/{policy}"

    def command(self, port: int) -> list[str]:
        options = [
            *(f"--model={peer_model('vllm')}", "--served-model-name=smollm2", "--dtype=bfloat16"),
            *(f"--port={port}", "--host=127.0.0.1", f"--max-model-len={VLLM_CONTEXT_TOKENS}"),
            *("--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"),
            f"--long-prefill-token-threshold={self.long_threshold_tokens}",
            f"--scheduling-policy={'priority' if self.chats_first else 'fcfs'}",
        ]
        if self.budget_tokens is not None:
            options.append(f"--max-num-batched-tokens={self.budget_tokens}")
        return [str(peer_python("vllm")), "-m", "vllm.entrypoints.openai.api_server", *options]

    def environment(self) -> Mapping[str, str]:
        cores = sorted(os.sched_getaffinity(0))
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(VLLM_KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CACHE_ROOT": str(peers_home() / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


Form = Ours | Vllm


def vllm_missing() -> str:
    return peer_missing("vllm")


@contextlib.contextmanager
def serving(form: Form, log: Path) -> Iterator[Target]:
    """The form's server, warm; what it prints goes to ``log``.

    Raises:
        ServerFailed: it ended, or was not ready within ``START_S_MAX``, or its first answers fail.
    """
    port = _free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            form.command(port),
            cwd=ROOT,
            env={**os.environ, **form.environment()},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt is ours to pass on, once
        )
    try:
        url = f"http://127.0.0.1:{port}"
        target = Target(url, _model(url, process, log), chats_first=form.chats_first)
        for outcome in asyncio.run(drive(target, WARM_UP)):
            if outcome.error:
                raise ServerFailed(f"{form.name} fails a warm-up request: {outcome.error}")
        yield target
    finally:
        _end(process)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _model(url: str, process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The name of the model, once the server says it."""
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline and process.poll() is None:
        with (
            contextlib.suppress(OSError, ValueError),  # nobody there yet, or somebody else
            urllib.request.urlopen(f"{url}/v1/models") as answer,
        ):
            return str(json.load(answer)["data"][0]["id"])
        time.sleep(0.2)
    state = "is not ready" if process.poll() is None else f"ended with {process.returncode}"
    tail = log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
    raise ServerFailed(f"{' '.join(map(str, process.args))} {state}; {log} ends with:\n{tail}")  # type: ignore[arg-type]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Asks the server to end and waits; then ends what is left of its process group."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S_MAX)
    with contextlib.suppress(ProcessLookupError):  # nothing is left, which is usual
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
