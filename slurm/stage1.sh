#!/usr/bin/env bash
# Stage 1, learn:   sbatch --nodes=4 slurm/stage1.sh RECIPE [key=value ...]
# Stops with a checkpoint before the time limit and is requeued, as after a lost node or a preemption: docs/slurm.md.
#SBATCH --job-name=lbr-stage1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0

LBR_HOME=${LBR_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -r "$LBR_HOME/slurm/lib.sh" ] || { echo "error: no slurm/lib.sh in $LBR_HOME: set LBR_HOME to lbr_dist's folder" >&2; exit 2; }
# shellcheck source=slurm/lib.sh
. "$LBR_HOME/slurm/lib.sh"
train generative "$@"
