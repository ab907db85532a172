#!/usr/bin/env bash
# The model that ships, on one GPU in a given time: release_gpu.sh DATA OUTPUT SECONDS
#   1 a network learns the next token; 2 from it the twin goes on, and beside it the diffusion model learns both
#   visibilities; 3 the twin writes texts and the diffusion model is made certain on them (which did not ship: LOG.md).
# DATA holds what `dlm train stories` writes: simple.txt.xz, rest.txt.xz (stories, documents separated by <|endoftext|>)
# and chat.jsonl.xz (prompt, response). Every stage ends by itself, with its learning rate decayed and its model exported.
set -euo pipefail
DATA=$1; OUTPUT=$2; SECONDS_IN_ALL=$3
cd "$(dirname "$0")/.."
TOKENS=dlm/assets/llama-stories-6m-autoregressive  # the tokenizer
part() { echo $((SECONDS_IN_ALL * $1 / 100)); }
common=(--data "$DATA/simple.txt.xz:0.45,$DATA/rest.txt.xz:0.40" --sequence-length 256 --batch-size "${BATCH:-128}"
  --optimizer muon --max-steps 1000000 --precision "${PRECISION:-bf16}" --sample-every 0
  --checkpoint-every 10000000 --tracker none "${COMPILE:---compile}")
stories=("${common[@]}" --chats "$DATA/chat.jsonl.xz:0.15" --learning-rate 2e-3 --muon-learning-rate 4e-3)
both=(--objective block_diffusion --block-length 8 --full-share 0.5)
read -r -a shape <<<"${SHAPE:---d-model 384 --n-layers 6 --n-heads 6 --mlp-hidden-size 1024}"
pretrain() { python -m train.pretrain "${stories[@]}" --output "$OUTPUT/$1" --export "$OUTPUT/$1/export" --max-seconds "$2" "${@:3}"; }

pretrain stage1 "$(part 8)" "${shape[@]}" --tokenizer $TOKENS --max-sequence-length 512 --objective autoregressive \
  --schedule constant --ema 0.99 --seed 0
python -m train.convert --from "$OUTPUT/stage1/model" --to "$OUTPUT/stage1/converted" --block-length 8
start=(--schedule wsd --decay-fraction 0.6 --warmup-steps 50 --ema 0.995 --seed 1)
pretrain twin "$(part 24)" "${start[@]}" --model "$OUTPUT/stage1/model" --objective autoregressive &
twin=$!
pretrain both "$(part 48)" "${start[@]}" --model "$OUTPUT/stage1/converted" "${both[@]}" &
wait $!  # each by its number: `wait` alone does not say that one failed
wait $twin
python -m train.distill "${common[@]}" "${both[@]}" --model "$OUTPUT/both/export" --teacher "$OUTPUT/twin/export" \
  --texts "${TEXTS:-8000}" --certainty 2 --learning-rate 1e-3 --muon-learning-rate 1.5e-3 --schedule wsd \
  --decay-fraction 0.8 --warmup-steps 30 --ema 0.99 --seed 2 --max-seconds "$(part 14)" \
  --output "$OUTPUT/certain" --export "$OUTPUT/certain/export"
