# The steps that the paper's recipes share: each recipe reads this file and calls them in order.
#
#     bash examples/recipes/dmlab.sh RAW WORK [STEP ...]
#
# WORK gets everything that is made. Run it from the repository's root; given again, it trains on from its checkpoints.
# STEP is prepare, train_vae, cache, train_far or evaluate; all of them if left out. A recipe is the paper's
# (arXiv:2503.19325) but for what a comment calls ours. Its trainings are the .yaml of its name and vae.yaml.
# The environment says on what: GPUS on a machine, MACHINES, and of several machines MACHINE_RANK (0, 1 ...) and the first
# one's MAIN_IP. Then WORK is on storage that all see, and each machine is given train_vae, later train_far; the other
# steps are for one machine. See docs/machines.md.
set -euo pipefail
raw=$1 work=$2 steps=("${@:3}") name=${0##*/} name=${name%.sh}
for step in "${steps[@]}"; do
    if [[ " prepare train_vae cache train_far evaluate " != *" $step "* ]]; then
        echo "STEP is $step; give prepare, train_vae, cache, train_far, evaluate, or none for all of them." >&2
        exit 2
    fi
done
lpips=weights/lpips_vgg.pth i3d=weights/i3d_torchscript.pt # yours to bring: see docs/evaluate.md
processes=$((${GPUS:-8} * ${MACHINES:-1}))
if ((32 % processes)); then
    echo "GPUS x MACHINES is $processes, which does not divide the 32 clips of a step; take 1, 2, 4, 8, 16 or 32." >&2
    exit 2
fi
launch=(accelerate launch --config_file examples/configs/accelerate/multi_gpu.yaml --num_processes $processes)
if ((${MACHINES:-1} > 1)); then
    launch+=(--num_machines "$MACHINES" --machine_rank "$MACHINE_RANK" --main_process_ip "$MAIN_IP" --main_process_port 29500)
fi
# A process that dies, or a machine that starts again, costs what was done since the last checkpoint.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
restarting=("${launch[@]}" --rdzv_backend c10d --max_restarts 3)

is_left_out() { ((${#steps[@]})) && [[ " ${steps[*]} " != *" $1 "* ]]; }

# 1. Frames: prepare SOURCE SIZE. The share for validation is ours.
prepare() {
    is_left_out prepare && return
    [ -d "$work/train" ] || python examples/prepare_dataset.py --source "$1" --input "$raw/train" \
        --output "$work/train" --size "$2" --validation_share 0.01 --num_processes 16
    [ -d "$work/test" ] || python examples/prepare_dataset.py --source "$1" --input "$raw/test" \
        --output "$work/test" --size "$2" --split test --num_processes 16
}

# 2. An image autoencoder: train_vae CONFIG. L1, LPIPS, and a patch GAN from half-way; vae.yaml is ours but for the losses.
train_vae() {
    is_left_out train_vae && return
    "${restarting[@]}" examples/train_vae.py examples/recipes/vae.yaml --dataset_name "$work/train" \
        --vae_config "examples/configs/$1" --lpips_weights "$lpips" --train_batch_size $((256 / processes)) \
        --output_dir "$work/vae" --resume_from_checkpoint latest
}

# 3. Latents
cache() {
    is_left_out cache && return
    for split in train validation; do
        python examples/cache_latents.py --dataset_name "$work/train" --dataset_split $split --vae "$work/vae" \
            --output_dir "$work/latents"
    done
}

# 4. The model, with the settings of the recipe's .yaml
train_far() {
    is_left_out train_far && return
    "${restarting[@]}" examples/train_far.py "examples/recipes/$name.yaml" --latents_dir "$work/latents" \
        --vae "$work/vae" --train_batch_size $((32 / processes)) --output_dir "$work/far" --resume_from_checkpoint latest
}

# 5. Scores: evaluate NAME FLAGS ...
evaluate() {
    is_left_out evaluate && return
    "${launch[@]}" examples/evaluate.py --model "$work/far" --dataset_name "$work/test" --output "$work/$1" \
        --i3d_weights "$i3d" --mixed_precision bf16 "${@:2}"
}
