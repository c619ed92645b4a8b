#!/usr/bin/env bash
# A training run on several machines by Slurm; docs/scaling.md explains it. The arguments are those of `fastgpt train`:
#   sbatch deploy/slurm.sh --config gpt2-350m --data /shared/data/base --out /shared/runs/350m --save-minutes 30
# Two minutes before the time is over, the run writes a checkpoint and the job is queued again; after a failure of a
# machine Slurm queues it again by itself. The same command resumes the run.
#SBATCH --job-name=fastgpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fastgpt-%j.log
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5 NCCL_DEBUG=WARN

stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# A process for each GPU, without torchrun, so that signals reach it directly
srun --kill-on-bad-exit=1 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec fastgpt train "$@"' fastgpt "$@" &
code=0
wait $! || code=$?
if [ -n "$stopped" ]; then # the signal ended that wait, and the run writes its checkpoint
    code=0
    wait $! || code=$?
    [ "$code" -ne 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
