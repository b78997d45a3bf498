#!/bin/bash
# A dask.distributed cluster for --cluster: a scheduler and its workers in one job; they run until the job ends.
#   pip install 'dask[distributed]'
#   sbatch slurm/cluster.sh            # prints the address into cluster_<job>.log
#   .venv/bin/python preprocessing/camera.py --cluster tcp://<node>:8786
#SBATCH --job-name=dask
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=4
#SBATCH --mem-per-cpu=1G
#SBATCH --time=04:00:00
#SBATCH --output=cluster_%j.log

cd "${SLURM_SUBMIT_DIR:?"submit this with sbatch from the repository root"}" || exit 1
address=tcp://$(hostname):8786
echo "the scheduler's address: $address"
.venv/bin/dask scheduler --port 8786 &
exec srun .venv/bin/dask worker "$address" --nworkers "$SLURM_CPUS_PER_TASK" --nthreads 1
