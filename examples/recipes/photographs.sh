#!/usr/bin/env bash
# Trains a model for photographs on several COCO-panoptic sets, in one step: about four hours on one core with bfloat16
# units. releases/photographs was trained so, but for a start that its card tells.
#
#   examples/recipes/photographs.sh OUT SETS AGNOSTIC CATEGORIES [key=value ...]
#
# SETS is `data.root`: folders with commas between, such as coco:train2017:,msrc:train:,camvid:train:val. AGNOSTIC names
# the folders whose categories say nothing, with commas between, or is "". CATEGORIES is how many the others have in all.
# OUT gets three training runs and the small weights. Settings after it go to all trainings and come last, so they win. A
# second call goes on where the first was interrupted. LAUNCH="torchrun --nproc_per_node 2" trains on two ranks.
set -euo pipefail
out=${1:?usage: photographs.sh OUT SETS AGNOSTIC CATEGORIES [key=value ...]}
sets=${2:?SETS: COCO-panoptic folders with commas between, as data.root takes them}
agnostic=${3?AGNOSTIC: folders without categories, or \"\"}
categories=${4:?CATEGORIES: how many the sets have in all}
shift 4
code=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python}
launch=${LAUNCH:-$python}
resume() { ls "$1"/checkpoints/step-*/manifest.json > /dev/null 2>&1 && echo --resume || true; }

# Latents of 16 channels hold ids and categories. EfficientNet-Lite0 sees pictures of four times the masks' side, and
# convolutions that are trained see them at the masks' own. Its last five blocks learn at a tenth of the rate.
common=(--config photographs data.root="$sets" data.class_agnostic="$agnostic" mask_vae.num_slots=48
    mask_vae.num_categories="$categories" mask_vae.latent_channels=16
    image_encoder.latent_channels=64 image_encoder.widths=32,64,96 image_encoder.picture_scale=4
    image_encoder.fine_features=convolutions)
late=unet.:1,image_vae.network.:0
for block in 11 12 13 14 15; do late+=",image_vae.network.blocks.$block.:0.1"; done

# 1. Maps to latents and back
$launch "$code/ldmseg_fast/train.py" autoencoder $(resume "$out/autoencoder") "${common[@]}" \
    data.image_size=64 data.scale_min=0.6 unet.sample_size=16 output_dir="$out/autoencoder" train.steps=1200 "$@"

# 2. Pictures to maps in one step; things of other pictures are pasted into two of five, and the rate stays
one_step=("${common[@]}" loss.category=0.5 train.optimizer=muon train.learning_rate=0.0008 train.lr_factors="$late"
    postprocess.mask_threshold=0.2)
$launch "$code/ldmseg_fast/train.py" one_step $(resume "$out/one_step") "${one_step[@]}" \
    model.mask_vae="$out/autoencoder" data.image_size=96 unet.sample_size=24 data.paste=0.4 train.schedule=constant \
    train.ema=0.998 train.steps=6000 output_dir="$out/one_step" "$@"

# 3. The same at a falling rate, at the size at which it is used
$launch "$code/ldmseg_fast/train.py" one_step $(resume "$out/falling") "${one_step[@]}" \
    model.init_from="$out/one_step" few_step.resize=true data.image_size=112 unet.sample_size=28 data.paste=0.2 \
    train.warmup=30 train.steps=1200 output_dir="$out/falling" "$@"

# 4. A quarter of its size, with a card that tells how it was trained
$python -m ldmseg_fast.cli ship "$out/falling" "$out/shipped/model" --dtype int8
