#!/usr/bin/env bash
# Generation on UCF-101, 128x128: FAR-L on 16 frames, every third, under 101 classes.
#
#     bash examples/recipes/ucf101_generation.sh RAW WORK
#
# RAW holds train/ and test/ with a folder of videos for each class. For 256x256: size 256, dc_ae_f32.json; FAR-XL is
# far_xl_ucf101.json. steps.bash says the rest.
source examples/recipes/steps.bash

prepare classfolder 128
train_vae dc_ae_f16.json
cache
train_far
# FVD on 2,048 videos for each of four seeds, under classes at guidance 2, and free
for condition in class free; do
    evaluate scores-$condition --protocol latte --condition $condition --frame_interval 3
done
