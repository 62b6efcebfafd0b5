#!/usr/bin/env bash
# Trains a model for photographs on one GPU, in one step: 256x256 maps of 512x512 pictures, half an hour in calls of nine
# minutes. Not tried at this size yet.
#
#   examples/recipes/photographs_256.sh OUT SETS AGNOSTIC CATEGORIES [key=value ...]
#
# The arguments are those of photographs.sh. OUT gets two training runs, a report for each set and the small weights.
# TESTS, in the form of SETS, is what the model is evaluated on; by default the validation splits of SETS. A call stops
# after SECONDS_A_CALL, 540 by default. Its exit code is 143 where something is left to do, and the next call goes on:
#
#   until examples/recipes/photographs_256.sh OUT ...; do [ $? = 143 ] || break; done
#
# MINUTES is the wall time of the second training, over all calls.
set -euo pipefail
out=${1:?usage: photographs_256.sh OUT SETS AGNOSTIC CATEGORIES [key=value ...]}
sets=${2:?SETS: COCO-panoptic folders with commas between, as data.root takes them}
agnostic=${3?AGNOSTIC: folders without categories, or \"\"}
categories=${4:?CATEGORIES: how many the sets have in all}
shift 4
code=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python}
launch=${LAUNCH:-$python}
call=${SECONDS_A_CALL:-540}
resume() { ls "$1"/checkpoints/step-*/manifest.json > /dev/null 2>&1 && echo --resume || true; }
# SIGTERM lets a training finish its step and save
timed() {
    [ "$SECONDS" -lt "$call" ] || exit 143
    timeout --foreground --preserve-status $((call - SECONDS)) "$@"
}

# As in photographs.sh: latents of 16 channels, trained convolutions beside ImageNet features, of which the last five
# blocks learn at a tenth of the rate
common=(--config photographs_256 data.root="$sets" data.class_agnostic="$agnostic" mask_vae.num_categories="$categories"
    mask_vae.latent_channels=16 image_encoder.fine_features=convolutions image_encoder.widths=32,64,96,128
    image_encoder.blocks=0,1,1,1 train.precision=bf16)
late=unet.:1,image_vae.network.:0
for block in 11 12 13 14 15; do late+=",image_vae.network.blocks.$block.:0.1"; done

# 1. Maps to latents and back
timed $launch "$code/ldmseg_fast/train.py" autoencoder $(resume "$out/autoencoder") "${common[@]}" \
    data.scale_min=0.6 output_dir="$out/autoencoder" train.steps=1200 train.max_minutes=7 "$@"

# 2. Pictures to maps in one step; the rate falls with the time
timed $launch "$code/ldmseg_fast/train.py" one_step $(resume "$out/one_step") "${common[@]}" \
    model.mask_vae="$out/autoencoder" data.paste=0.4 loss.category=0.5 train.optimizer=muon train.learning_rate=0.0008 \
    train.lr_factors="$late" postprocess.mask_threshold=0.2 train.max_minutes="${MINUTES:-20}" \
    output_dir="$out/one_step" "$@"

# 3. How good it is on every set; --out lets an evaluation go on too
IFS=, read -ra tests <<< "${TESTS:-$sets}"
for set in "${tests[@]}"; do
    IFS=: read -r root _ split _ <<< "$set:val2017:val2017"
    name=$(basename "$root")
    report=$out/$name-$split.json
    [ -n "$split" ] && [ ! -f "$report" ] || continue
    case ",$agnostic," in *",$name,"*) how=--class-agnostic ;; *) how= ;; esac
    timed $python -m ldmseg_fast.cli evaluate "$out/one_step" --data "$root" --split "$split" $how \
        --out "${report%.json}" --json "$report"
done

# 4. A quarter of its size, with a card that tells how it was trained
$python -m ldmseg_fast.cli ship "$out/one_step" "$out/shipped/model" --dtype int8
