#!/usr/bin/env bash
# Short prediction on BAIR, 64x64: FAR-B on 30 frames, all of them short.
#
#     bash examples/recipes/bair.sh RAW WORK
#
# RAW holds train/ and test/ with videos and a metadata.jsonl: {"file_name": "a.mp4"} for each; actions are not used.
# steps.bash says the rest.
source examples/recipes/steps.bash

prepare videofolder 64
train_vae dc_ae_f8.json
cache
train_far
# 2 -> 28 and 2 -> 14 frames, the best of 100 trajectories, 256 videos
for num_frames in 28 14; do
    evaluate scores-$num_frames --protocol mcvd --num_context_frames 2 --num_frames $num_frames --lpips_weights "$lpips"
done
