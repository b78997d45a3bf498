#!/bin/bash
# Training on one or several machines, one rank for each GPU. The job goes back into the queue when its time is over, and
# goes on from its checkpoint, also on another number of GPUs.
#   sbatch --gpus-per-node 1 slurm/train.sh --config configs/asymmetric.yaml
#   sbatch --nodes 4 --gpus-per-node 4 slurm/train.sh --config configs/asymmetric.yaml train.cycle=4
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=5
#SBATCH --mem-per-gpu=16G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=train_%j.log
# SIGUSR1 two minutes before the time limit, to all ranks: they save and end with 75.
#SBATCH --signal=USR1@120

cd "${SLURM_SUBMIT_DIR:?"submit this with sbatch from the repository root"}" || exit 1
per_node=${SLURM_GPUS_PER_NODE:-1}
per_node=${per_node##*:} # "a100:4" has the kind of GPU in front
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# srun and not torchrun: that makes 1 of exit code 75, and starts a job again that was asked to stop. Ranks end together
# by themselves; if the first to end had the others killed, the job's exit code would be theirs.
# The signal goes to srun's tasks; `trap` keeps this shell alive until they have ended.
trap ':' USR1 TERM
srun --kill-on-bad-exit=0 --ntasks-per-node="$per_node" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec .venv/bin/python train.py --resume "$@"' train "$@" &
job=$!
wait "$job"
code=$?
while kill -0 "$job" 2>/dev/null; do # `wait` returns when the signal comes, too
    wait "$job"
    code=$?
done
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
