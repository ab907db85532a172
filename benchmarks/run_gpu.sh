#!/usr/bin/env bash
# Speed on one GPU, in under nine minutes: LLaDA-8B's shape in bf16, and training steps of the 1B shape; each part with
# a time limit of its own.
#
#   benchmarks/run_gpu.sh                                      results in benchmarks/gpu/
#   FAST_DLLM=path/to/clone benchmarks/run_gpu.sh              Fast-dLLM beside it (two models: 32 GB of weights)
#   DEVICE=cpu CONFIG=small DTYPE=float32 TRAIN=small ROW=64 PRECISION=no COMPILE=off benchmarks/run_gpu.sh
#                                                              the same commands where there is no GPU
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} device=${DEVICE:-cuda} config=${CONFIG:-llada-8b} dtype=${DTYPE:-bfloat16}
train=${TRAIN:-llada-1b} row=${ROW:-2048} precision=${PRECISION:-bf16} compile=${COMPILE:-both}
length=${LENGTH:-512} out=${OUT:-benchmarks/gpu}
mkdir -p "$out"
common=(--config "$config" --dtype "$dtype" --device "$device" --prompt-length 32 --gen-length "$length")

"$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")'
git log -1 --format='commit %h' || true

timeout 180 "$python" -m benchmarks.speed "${common[@]}" --repeats 1 --profile --json "$out/batch_1.json" \
    --cells "none:32:$length" "dual:32:$length" "c2f:32:$length"
timeout 120 "$python" -m benchmarks.speed "${common[@]}" --repeats 1 --batch 32 --json "$out/batch_32.json" \
    --cells "dual:32:$((length / 4))"
timeout 120 "$python" -m benchmarks.training --config "$train" --length "$row" --batch 8 --precision "$precision" \
    --device "$device" --attn-implementation flex_attention --compile "$compile" --json "$out/training.json"
if [ -n "${FAST_DLLM:-}" ]; then
    timeout 110 "$python" -m benchmarks.peers "${common[@]}" --repeats 1 --json "$out/fast_dllm.json" \
        --peer "fast-dllm=$FAST_DLLM" --cells "dual:32:$length"
fi
