#!/bin/bash
# sbatch configs/launch/slurm.sh configs/llama3-8b-1m.yaml RUN_FOLDER [--key value ...]
#
# Eight hosts of eight GPUs, one process a host. RUN_FOLDER and the data lie on a file system that
# all hosts share. Slurm sends SIGTERM two minutes before the time is over: the run saves, ends with
# 0, and the job puts itself back into the queue; the same command then goes on from the checkpoint.
# A process that dies takes the others down by itself, and Slurm the rest (--kill-on-bad-exit).
#
#SBATCH --job-name=hcp
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=hcp-%j.log

set -euo pipefail

config=${1:?a config, such as configs/llama3-8b-1m.yaml}
folder=${2:?the run folder, on a shared file system}
shift 2

# Steps in the record of the run; 0 before its first start, when there is no record.
steps_made() { if [ -f "$folder/metrics.jsonl" ]; then wc -l <"$folder/metrics.jsonl"; else echo 0; fi; }

steps_before=$(steps_made)

# jax gives a task of Slurm the GPU of its number; a process that has a whole host says so itself.
gpus=$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-8} - 1)))
export JAX_LOCAL_DEVICE_IDS=$gpus

# Whoever does not know it is sent away where the processes meet (docs/runs.md).
HCP_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export HCP_SECRET

srun --kill-on-bad-exit=1 --label \
    hcp train "$config" --distributed --folder "$folder" "$@"

# Ended well: either all steps are made, or there was a SIGTERM. As long as steps are made, go on.
steps=$(steps_made)
if [ "$steps" -gt "$steps_before" ] && ! grep -q "^steps: $steps\$" "$folder/config.yaml"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
