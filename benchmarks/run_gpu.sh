#!/usr/bin/env bash
# Speed on one GPU in nine minutes: LLaDA-8B's shape in bf16, each part with a time limit of its own (`gpu.py` says which).
#
#   benchmarks/run_gpu.sh                                      results in benchmarks/gpu/
#   PART=quick SECONDS_IN_ALL=100 benchmarks/run_gpu.sh        the parts of most value
#   FAST_DLLM=path/to/clone benchmarks/run_gpu.sh              Fast-dLLM beside it (two models: 32 GB of weights)
#   DEVICE=cpu CONFIG=small DTYPE=float32 LENGTH=64 TRAIN=small benchmarks/run_gpu.sh
#                                                              the same parts where there is no GPU
set -u
cd "$(dirname "$0")/.." || exit 1
exec "${PYTHON:-python3}" -m benchmarks.gpu --out "${OUT:-benchmarks/gpu}" --seconds "${SECONDS_IN_ALL:-540}" \
    --parts "${PART:-all}" --device "${DEVICE:-cuda}" --config "${CONFIG:-llada-8b}" --dtype "${DTYPE:-bfloat16}" \
    --gen-length "${LENGTH:-512}" --train-config "${TRAIN:-llada-1b}" ${FAST_DLLM:+--fast-dllm "$FAST_DLLM"}
