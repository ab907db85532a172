#!/usr/bin/env bash
# Speed on one GPU, in under nine minutes: LLaDA-8B's shape in bf16, with passes replayed as CUDA graphs, in fp8 and for
# 32 prompts at a time, and training steps of the 1B shape; each part with a time limit of its own.
#
#   benchmarks/run_gpu.sh                                      results in benchmarks/gpu/
#   PART=grid benchmarks/run_gpu.sh                            instead the 165 cells of a question of a grid (see below)
#   FAST_DLLM=path/to/clone benchmarks/run_gpu.sh              Fast-dLLM beside it (two models: 32 GB of weights)
#   DEVICE=cpu CONFIG=small DTYPE=float32 TRAIN=small ROW=64 PRECISION=no COMPILE=off benchmarks/run_gpu.sh
#                                                              the same commands where there is no GPU
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} device=${DEVICE:-cuda} config=${CONFIG:-llada-8b} dtype=${DTYPE:-bfloat16}
train=${TRAIN:-llada-1b} row=${ROW:-2048} precision=${PRECISION:-bf16} compile=${COMPILE:-both}
length=${LENGTH:-512} out=${OUT:-benchmarks/gpu}
mkdir -p "$out"
common=(--config "$config" --device "$device" --prompt-length 32 --gen-length "$length")

"$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")'
git log -1 --format='commit %h' || true

graphs="" few=int8
if [ "$device" = cuda ]; then graphs=--cuda-graphs few=fp8; fi
if [ "${PART:-}" = grid ]; then  # every block length and number of steps that is a power of two and feasible
    cells=()
    for method in none dual c2f; do
        for ((block = length; block >= 1; block /= 2)); do
            for ((steps = length / block; steps <= length; steps *= 2)); do cells+=("$method:$block:$steps"); done
        done
    done
    timeout 530 "$python" -m benchmarks.speed "${common[@]}" --dtype "$dtype" --repeats 1 --warm-up 0 $graphs \
        --json "$out/grid.json" --cells "${cells[@]}"
    exit
fi
if [ "$device" = cuda ]; then
    timeout 40 "$python" -m pytest -q tests/test_kernels.py tests/test_fp8.py || true  # what a processor cannot show
fi
cells=("none:32:$length" "dual:32:$length" "c2f:32:$length")
timeout 110 "$python" -m benchmarks.speed "${common[@]}" --dtype "$dtype" --repeats 1 --profile \
    --json "$out/plain.json" --cells "${cells[@]}"
timeout 70 "$python" -m benchmarks.speed "${common[@]}" --dtype "$dtype" --repeats 1 $graphs \
    --json "$out/graphs.json" --cells "${cells[@]}"
timeout 80 "$python" -m benchmarks.speed "${common[@]}" --dtype "$few" --repeats 1 $graphs \
    --json "$out/$few.json" --cells "${cells[@]}"
timeout 70 "$python" -m benchmarks.speed "${common[@]}" --dtype "$dtype" --repeats 1 --batch 32 $graphs \
    --json "$out/batch_32.json" --cells "dual:32:$((length / 4))"
timeout 90 "$python" -m benchmarks.training --config "$train" --length "$row" --batch 8 --precision "$precision" \
    --device "$device" --attn-implementation flex_attention --compile "$compile" --json "$out/training.json"
if [ -n "${FAST_DLLM:-}" ]; then
    timeout 70 "$python" -m benchmarks.peers "${common[@]}" --dtype "$dtype" --repeats 1 --json "$out/fast_dllm.json" \
        --peer "fast-dllm=$FAST_DLLM" --cells "dual:32:$length"
fi
