"""Where the peers are that ``peers/setup.sh`` sets up, and which of them are missing."""

import os
from pathlib import Path
from typing import NamedTuple

from pdserve.model.source import DEFAULT_FILE


class Peer(NamedTuple):
    """As ``peers/setup.sh`` sets one up."""

    name: str
    model: str  # below ``model``
    whole: str  # a file in that, if it is a directory, which is there when all of it is


PEERS = {
    "vllm": Peer("vLLM", "hf", "model.safetensors"),
    "llama": Peer("llama.cpp", DEFAULT_FILE, ""),
}


def peers_home() -> Path:
    """Where ``peers/setup.sh`` put them."""
    return Path(os.environ.get("PDSERVE_PEERS", "~/.cache/pdserve-peers")).expanduser()


def peer_python(peer: str) -> Path:
    return peers_home() / peer / "bin/python"


def peer_model(peer: str) -> Path:
    """The model's files as the peer reads them."""
    return peers_home() / "model" / PEERS[peer].model


def peer_missing(peer: str) -> str:
    """Why a peer cannot be measured here; "" where it can."""
    home, (name, _, whole) = peers_home(), PEERS[peer]
    if peer_python(peer).exists() and (peer_model(peer) / whole).exists():
        return ""
    return f"no {name} in {home}: run bench/peers/setup.sh model {peer}"
