#!/bin/bash
# One preprocessing script as a job array: each job processes one shard of the frames. Submit a shard that failed or was
# stopped again; finished frames are skipped.
#   sbatch slurm/preprocess.sh segmentation --data Datasets/camera_lidar_semantic_bboxes
#   sbatch --array=3 --export=ALL,SHARDS=8 slurm/preprocess.sh camera      # shard 3 of 8 again
#SBATCH --job-name=preprocess
#SBATCH --array=1-8
#SBATCH --cpus-per-task=4
#SBATCH --mem=4G
#SBATCH --time=04:00:00
#SBATCH --output=preprocess_%A_%a.log
# SLURM sends SIGTERM before the time limit: the script then ends with exit code 75, and leaves no partial files.
#SBATCH --signal=TERM@60

script=${1:?"name a script: camera, segmentation, depth_preprocess, bounding_box or steering_angle"}
shift
cd "${SLURM_SUBMIT_DIR:?"submit this with sbatch from the repository root"}" || exit 1
exec .venv/bin/python "preprocessing/$script.py" --threads "${SLURM_CPUS_PER_TASK:-4}" \
    --shard "$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}" "$@"
