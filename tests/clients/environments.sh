#!/usr/bin/env bash
# Installs each client in its current release:   environments.sh [NAME …]      default: all
# An environment each in .venv-clients, since no versions suit all of them at once.
set -euo pipefail
cd "$(dirname "$0")/../.."
uv=.venv/bin/uv
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}} # uv does not read what pip is told
# Some ask for a certifi so new that not every index has it, and pip would take an older client
# instead. Any will do: nothing here speaks TLS.
UV_OVERRIDE=$(mktemp)
trap 'rm -f "$UV_OVERRIDE"' EXIT
echo certifi >"$UV_OVERRIDE"
export UV_OVERRIDE
names=("$@")
((${#names[@]})) || names=(anthropic litellm langchain pydantic_ai tritonclient vllm guidellm aiperf lm_eval)

into() { # NAME ARGUMENT…: of "uv pip install"
  local place=.venv-clients/$1
  shift
  [[ -x $place/bin/python ]] || "$uv" venv -q --python .venv/bin/python "$place"
  "$uv" pip install -q --upgrade --python "$place/bin/python" "$@"
}

with_torch() { # the same, beside a build of torch for the CPU; from the usual index if need be
  UV_HTTP_TIMEOUT=20 into "$1" --torch-backend=cpu -r constraints-cpu.txt 2>/dev/null ||
    into "$1" -r constraints-cpu.txt
  into "$@" -c constraints-cpu.txt
}

vllm() { # of its source, without kernels: a load tool needs none, and the wheel is for CUDA
  with_torch vllm "setuptools<81" setuptools-scm setuptools-rust packaging wheel jinja2 cmake ninja
  VLLM_TARGET_DEVICE=empty into vllm "vllm[bench]" -c constraints-cpu.txt --no-binary vllm \
    --no-build-isolation-package vllm
  # It asks for these, of the usual index: builds for CUDA, which do not load beside such a torch.
  "$uv" pip uninstall -q --python .venv-clients/vllm/bin/python torchvision torchaudio torchcodec
}

for name in "${names[@]}"; do
  case $name in
  anthropic) into anthropic anthropic ;;
  litellm) into litellm litellm mcp ;;
  langchain) into langchain langchain-openai ;;
  pydantic_ai) into pydantic_ai "pydantic-ai-slim[openai]" ;;
  tritonclient) into tritonclient "tritonclient[grpc]" ;;
  vllm) vllm ;;
  guidellm) with_torch guidellm guidellm ;;
  aiperf) into aiperf aiperf ;;
  lm_eval) into lm_eval "lm-eval[api]" transformers ;; # which reads a tokeniser of a directory
  *)
    echo "no client has the name $name" >&2
    exit 2
    ;;
  esac
done
