#!/usr/bin/env bash
# Generation on UCF-101, 128x128: FAR-L on 16 frames, every third, under 101 classes.
#
#     bash examples/recipes/ucf101_generation.sh RAW WORK
#
# RAW holds train/ and test/ with a folder of videos for each class. For 256x256: --size 256, dc_ae_f32.json; FAR-XL is
# far_xl_ucf101.json.
# WORK gets everything that is made. Run it from the repository's root; given again, it trains on from its checkpoints.
# The recipe is the paper's (arXiv:2503.19325) but for what a comment calls ours. Its trainings are ucf101_generation.yaml and vae.yaml.
set -euo pipefail
raw=$1 work=$2
lpips=weights/lpips_vgg.pth i3d=weights/i3d_torchscript.pt # yours to bring: see docs/evaluate.md
launch=(accelerate launch --config_file examples/configs/accelerate/multi_gpu.yaml --num_processes 8)

# 1. Frames. The share for validation is ours.
[ -d "$work/train" ] || python examples/prepare_dataset.py --source classfolder --input "$raw/train" \
    --output "$work/train" --size 128 --validation_share 0.01 --num_processes 16
[ -d "$work/test" ] || python examples/prepare_dataset.py --source classfolder --input "$raw/test" \
    --output "$work/test" --size 128 --split test --num_processes 16

# 2. An image autoencoder: L1, LPIPS, and a patch GAN from half-way. vae.yaml is ours but for the losses.
"${launch[@]}" examples/train_vae.py examples/recipes/vae.yaml --dataset_name "$work/train" \
    --vae_config examples/configs/dc_ae_f16.json --lpips_weights "$lpips" --output_dir "$work/vae" \
    --resume_from_checkpoint latest

# 3. Latents
for split in train validation; do
    python examples/cache_latents.py --dataset_name "$work/train" --dataset_split $split --vae "$work/vae" \
        --output_dir "$work/latents"
done

# 4. FAR-L
"${launch[@]}" examples/train_far.py examples/recipes/ucf101_generation.yaml --latents_dir "$work/latents" \
    --vae "$work/vae" --output_dir "$work/far" --resume_from_checkpoint latest

# 5. FVD on 2,048 videos for each of four seeds, under classes at guidance 2, and free
for condition in class free; do
    "${launch[@]}" examples/evaluate.py --protocol latte --condition $condition --model "$work/far" \
        --dataset_name "$work/test" --frame_interval 3 --output "$work/scores-$condition" --i3d_weights "$i3d" \
        --mixed_precision bf16
done
