#!/usr/bin/env bash
# Trains a model with categories on generated scenes, in one step and for completing maps: about three hours on one core
# with bfloat16 units. The shipped model tiny was trained so, but for a start that its card tells.
#
#   examples/recipes/scenes.sh OUT [key=value ...]
#
# OUT gets the scenes, three training runs and the small weights. Settings after it go to all trainings and come last, so
# they win. A second call goes on where the first was interrupted. LAUNCH="torchrun --nproc_per_node 2" trains on two
# ranks.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: scenes.sh OUT [key=value ...]}
shift
python=${PYTHON:-python}
launch=${LAUNCH:-$python}
resume() { ls "$1"/checkpoints/step-*/manifest.json > /dev/null 2>&1 && echo --resume || true; }

# 1. Scenes of both versions; their categories, 19 and 14, of which 7 have the same names, are joined
$python -m ldmseg_fast.cli data scenes "$out/scenes2" --images "${SCENES:-12000}" --size 64 --seed 1 --version 2
$python -m ldmseg_fast.cli data scenes "$out/scenes1" --images "${OLD_SCENES:-20000}" --size 64 --seed 1 --version 1

# Latents of 16 channels hold ids and categories. EfficientNet-Lite0, which stays as it is, sees pictures of 256x256, and
# convolutions that are trained see them at 64x64.
common=(--config tiny data.root="$out/scenes2,$out/scenes1" mask_vae.num_categories=26 mask_vae.latent_channels=16
    image_encoder.kind=efficientnet_lite image_encoder.picture_scale=4 image_encoder.fine_features=convolutions
    train.image_encoder_lr=0 train.batch_size=16 data.val_limit=100)

# 2. Maps to latents and back
$launch ldmseg_fast/train.py autoencoder $(resume "$out/autoencoder") "${common[@]}" \
    data.weights=2,1 output_dir="$out/autoencoder" train.steps=1000 "$@"

# 3. Pictures to maps in one step, with a decoder that learns on; the rate stays, so that the run can end at any step
one_step=("${common[@]}" data.weights=1,2 diffusion.latent_scale=1.0 few_step.train_decoder=true loss.category=0.5
    train.optimizer=muon train.learning_rate=0.0008)
$launch ldmseg_fast/train.py one_step $(resume "$out/one_step") "${one_step[@]}" \
    model.mask_vae="$out/autoencoder" output_dir="$out/one_step" train.schedule=constant train.ema=0.999 train.steps=9000 \
    "$@"

# 4. The same at a falling rate, and blocks of the map are given for a third of the pictures
$launch ldmseg_fast/train.py one_step $(resume "$out/completing") "${one_step[@]}" \
    model.init_from="$out/one_step" output_dir="$out/completing" diffusion.inpainting=0.35 train.warmup=30 train.steps=2000 \
    "$@"

# 5. How good it is, and a quarter of its size, with a card that tells how it was trained
for scenes in scenes2 scenes1; do
    $python -m ldmseg_fast.cli evaluate "$out/completing" --data "$out/$scenes" --limit "${IMAGES:-500}" \
        --json "$out/$scenes.json"
done
$python -m ldmseg_fast.cli evaluate "$out/completing" --data "$out/scenes2" --limit "${IMAGES:-500}" --inpainting
$python -m ldmseg_fast.cli ship "$out/completing" "$out/shipped/model" --dtype int8
