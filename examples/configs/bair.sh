#!/usr/bin/env bash
# Short prediction on BAIR, 64x64: FAR-B on 30 frames, all of them short.
#
#     bash examples/configs/bair.sh RAW WORK
#
# RAW holds train/ and test/ with videos and a metadata.jsonl: {"file_name": "a.mp4"} for each; actions are not used.
# WORK gets everything that is made. Run it from the repository's root; given again, it trains on from its checkpoints.
# The recipe is the paper's (arXiv:2503.19325) but for what a comment calls ours. Batch 32 is 4 clips on each of 8 GPUs.
set -euo pipefail
raw=$1 work=$2
lpips=weights/lpips_vgg.pth i3d=weights/i3d_torchscript.pt # yours to bring: see docs/evaluate.md
launch=(accelerate launch --config_file examples/configs/accelerate/multi_gpu.yaml --num_processes 8)

# 1. Frames. The share for validation is ours.
[ -d "$work/train" ] || python examples/prepare_dataset.py --source videofolder --input "$raw/train" \
    --output "$work/train" --size 64 --validation_share 0.01 --num_processes 16
[ -d "$work/test" ] || python examples/prepare_dataset.py --source videofolder --input "$raw/test" \
    --output "$work/test" --size 64 --split test --num_processes 16

# 2. An image autoencoder: L1, LPIPS, and a patch GAN from half-way. Steps, batch and learning rate are ours.
"${launch[@]}" examples/train_vae.py --dataset_name "$work/train" --vae_config examples/configs/dc_ae_f8.json \
    --output_dir "$work/vae" --max_train_steps 100000 --train_batch_size 32 --learning_rate 1e-4 \
    --lpips_weights "$lpips" --disc_start 50000 --mixed_precision bf16 --resume_from_checkpoint latest

# 3. Latents
for split in train validation; do
    python examples/cache_latents.py --dataset_name "$work/train" --dataset_split $split --vae "$work/vae" \
        --output_dir "$work/latents"
done

# 4. FAR-B
"${launch[@]}" examples/train_far.py --latents_dir "$work/latents" --vae "$work/vae" \
    --transformer_config far-b --num_frames 30 \
    --max_train_steps 200000 --lr_scheduler constant \
    --learning_rate 1e-4 --adam_beta1 0.9 --adam_beta2 0.999 --adam_weight_decay 0 --max_grad_norm 1.0 \
    --train_batch_size 4 --use_ema --ema_decay 0.9999 --mixed_precision bf16 --dataloader_num_workers 4 \
    --output_dir "$work/far" --resume_from_checkpoint latest

# 5. 2 -> 28 and 2 -> 14 frames, the best of 100 trajectories, 256 videos
for num_frames in 28 14; do
    "${launch[@]}" examples/evaluate.py --protocol mcvd --num_context_frames 2 --num_frames $num_frames \
        --model "$work/far" --dataset_name "$work/test" --output "$work/scores-$num_frames" \
        --lpips_weights "$lpips" --i3d_weights "$i3d" --mixed_precision bf16
done
