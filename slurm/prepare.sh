#!/usr/bin/env bash
# Prepare data:   sbatch slurm/prepare.sh SOURCE ... --out DIR --tokenizer MODEL [options of lbr prepare]
# Can be repeated: a set that is there already is left as it is; a lost node starts it again.
#SBATCH --job-name=lbr-prepare
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0

LBR_HOME=${LBR_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -r "$LBR_HOME/slurm/lib.sh" ] || { echo "error: no slurm/lib.sh in $LBR_HOME: set LBR_HOME to lbr_dist's folder" >&2; exit 2; }
# shellcheck source=slurm/lib.sh
. "$LBR_HOME/slurm/lib.sh"
trap : USR1 # of SBATCH_SIGNAL: a preparation cannot stop half-way, and uses what is left of its time

[ $# -gt 0 ] || die "no source: sbatch slurm/prepare.sh SOURCE ... --out DIR --tokenizer MODEL"
on_first_node -m lbr_dist prepare "$@"
