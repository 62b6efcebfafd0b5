#!/usr/bin/env bash
# Trains a diffusion model on, so that it needs one step only and completes maps, and makes small weights of it.
#
#   examples/recipes/one_step.sh MODEL_DIR DATA OUT [key=value ...]
#
# MODEL_DIR is what tiny.sh calls OUT/diffusion, or any diffusion model; DATA is what it was trained on. Settings after
# OUT go to both trainings and win. A second call goes on where the first was interrupted.
set -euo pipefail
cd "$(dirname "$0")/../.."
usage="usage: one_step.sh MODEL_DIR DATA OUT [key=value ...]"
model=${1:?$usage} data=${2:?$usage} out=${3:?$usage}
shift 3
python=${PYTHON:-python}
launch=${LAUNCH:-$python}
resume() { ls "$1"/checkpoints/step-*/manifest.json > /dev/null 2>&1 && echo --resume || true; }
common=(--config tiny data.root="$data" train.learning_rate=0.0005 train.warmup=50 train.ema=0.995)

# 1. One step, with the auto-encoder's loss on the decoded map
$launch ldmseg_fast/train.py one_step $(resume "$out/one_step") "${common[@]}" \
    output_dir="$out/one_step" model.init_from="$model" train.steps=1700 "$@"

# 2. The same, and blocks of the map are given for half of the pictures
$launch ldmseg_fast/train.py one_step $(resume "$out/completing") "${common[@]}" \
    output_dir="$out/completing" model.init_from="$out/one_step" diffusion.inpainting=0.5 train.steps=2800 "$@"

# 3. Maps from pictures, and completed ones
$python -m ldmseg_fast.cli evaluate "$out/completing" --data "$data" --limit "${IMAGES:-500}" --json "$out/one_step.json"
$python -m ldmseg_fast.cli evaluate "$out/completing" --data "$data" --limit "${IMAGES:-500}" --inpainting

# 4. A quarter of the size, with a card that tells how it was trained
$python -m ldmseg_fast.cli ship "$out/completing" "$out/shipped/model" --dtype int8
