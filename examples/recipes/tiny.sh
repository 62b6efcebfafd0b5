#!/usr/bin/env bash
# Trains the first two stages of a model without categories, on generated scenes of version 1.
#
#   examples/recipes/tiny.sh OUT [key=value ...]
#
# OUT gets the scenes and two model folders. Settings after it go to both trainings and come last, so they win. A second
# call goes on where the first was interrupted. LAUNCH="torchrun --nproc_per_node 2" trains on two ranks.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: tiny.sh OUT [key=value ...]}
shift
python=${PYTHON:-python}
launch=${LAUNCH:-$python}
resume() { ls "$1"/checkpoints/step-*/manifest.json > /dev/null 2>&1 && echo --resume || true; }

# 1. Few scenes for the auto-encoder, which sees maps only; many for the diffusion model
$python -m ldmseg_fast.cli data scenes "$out/scenes4k" --images "${AUTOENCODER_SCENES:-4000}" --size 64 --seed 0 --version 1
$python -m ldmseg_fast.cli data scenes "$out/scenes20k" --images "${DIFFUSION_SCENES:-20000}" --size 64 --seed 1 --version 1

# 2. Maps to latents and back
$launch ldmseg_fast/train.py autoencoder --config tiny $(resume "$out/autoencoder") \
    data.root="$out/scenes4k" output_dir="$out/autoencoder" train.steps=3000 "$@"

# 3. Pictures to latents
$launch ldmseg_fast/train.py diffusion --config tiny $(resume "$out/diffusion") \
    data.root="$out/scenes20k" output_dir="$out/diffusion" model.mask_vae="$out/autoencoder" train.steps=3500 "$@"

# 4. How good it is; examples/recipes/one_step.sh goes on from here
$python -m ldmseg_fast.cli evaluate "$out/diffusion" --data "$out/scenes20k" --limit "${IMAGES:-500}" --json "$out/diffusion.json"
