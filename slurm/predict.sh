#!/bin/bash
# Predictions of a run as a job array: each job predicts one shard of the frames or pictures. Submit a shard that failed
# or was stopped again; finished frames are skipped.
#   sbatch slurm/predict.sh runs/asymmetric --data Datasets/processed/1024x640 --out predictions/asymmetric
#   sbatch --array=3 --export=ALL,SHARDS=4 slurm/predict.sh ...      # shard 3 of 4 again
#SBATCH --job-name=predict
#SBATCH --array=1-4
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=12G
#SBATCH --time=04:00:00
#SBATCH --output=predict_%A_%a.log

cd "${SLURM_SUBMIT_DIR:?"submit this with sbatch from the repository root"}" || exit 1
exec .venv/bin/python predict.py --workers "${SLURM_CPUS_PER_TASK:-4}" \
    --shard "$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}" "$@"
