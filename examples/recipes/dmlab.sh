#!/usr/bin/env bash
# Long prediction on DMLab, 64x64 with actions: FAR-B-Long on clips of 300 frames.
#
#     bash examples/recipes/dmlab.sh RAW WORK
#
# RAW holds train/ and test/ with .npz files of `video` and `actions`, TECO's layout. steps.bash says the rest.
source examples/recipes/steps.bash

prepare npz 64
train_vae dc_ae_f8.json
cache
train_far # each frame is fed the action that led to it, which is ours; the released weights were fed the one taken at it
# 144 -> 156 frames for PSNR, SSIM and LPIPS, 36 -> 264 for distances; guidance 1.5
evaluate scores --protocol teco --lpips_weights "$lpips"
