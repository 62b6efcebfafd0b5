#!/usr/bin/env bash
# Trains the paper's model on COCO, starting from Stable Diffusion 1.x: 512x512 pictures, 128 slots, several GPUs.
#
#   examples/recipes/coco.sh COCO SD_FOLDER OUT [key=value ...]
#
# COCO is a folder in COCO-panoptic layout, SD_FOLDER a Stable Diffusion 1.4 or 1.5 folder in diffusers' layout. Settings
# after OUT go to both trainings and win. A second call goes on where the first was interrupted. LAUNCH starts the
# ranks: "deepspeed" (the default) or "torchrun --nproc_per_node 8". DRY_RUN=--dry-run prints settings, parameters and
# memory of both trainings and does nothing else.
set -euo pipefail
cd "$(dirname "$0")/../.."
usage="usage: coco.sh COCO SD_FOLDER OUT [key=value ...]"
coco=${1:?$usage} stable_diffusion=${2:?$usage} out=${3:?$usage}
shift 3
python=${PYTHON:-python}
launch=${LAUNCH:-deepspeed}
dry_run=${DRY_RUN:-}
config=${CONFIG:-coco}
resume() { ls "$1"/checkpoints/step-*/manifest.json > /dev/null 2>&1 && echo --resume || true; }

# 1. Maps to latents and back, by the stage's own recipe, as the next one
$launch ldmseg_fast/train.py autoencoder --config "$config" $dry_run $(resume "$out/autoencoder") \
    data.root="$coco" output_dir="$out/autoencoder" "$@"

# 2. Every picture encoded once, which training reads in the place of pictures
if [ -z "$dry_run" ]; then
    $python -m ldmseg_fast.cli data cache "$coco" --image-vae "$stable_diffusion" --size "${SIZE:-512}"
fi

# 3. Pictures to latents; before the first training there is no auto-encoder that could be tried
autoencoder=(model.mask_vae="$out/autoencoder")
[ -z "$dry_run" ] || [ -d "$out/autoencoder" ] || autoencoder=()
$launch ldmseg_fast/train.py diffusion --config "$config" $dry_run $(resume "$out/diffusion") \
    data.root="$coco" output_dir="$out/diffusion" data.latent_cache=auto \
    ${autoencoder[@]+"${autoencoder[@]}"} model.init_from="$stable_diffusion" "$@"

# 4. Class-agnostic PQ at 50 steps, and with the categories of the ground truth
if [ -z "$dry_run" ]; then
    $python -m ldmseg_fast.cli evaluate "$out/diffusion" --data "$coco" --class-aware GT --out "$out/results" \
        --json "$out/diffusion.json"
fi
