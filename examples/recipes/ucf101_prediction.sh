#!/usr/bin/env bash
# Short prediction on UCF-101, 64x64: FAR-B on 16 frames.
#
#     bash examples/recipes/ucf101_prediction.sh RAW WORK
#
# RAW holds train/ and test/ with a folder of videos for each class; the classes are not used. steps.bash says the rest.
source examples/recipes/steps.bash

prepare classfolder 64
train_vae dc_ae_f8.json
cache
train_far
# 4 -> 12 frames, the best of 100 trajectories, 256 videos
evaluate scores --protocol mcvd --lpips_weights "$lpips"
