#!/usr/bin/env bash
# Evaluate, and export:   sbatch slurm/eval.sh MODEL ... --data SET [options of lbr eval] [-- OUT [options of lbr export]]
# What follows the -- exports the first model. Both can be repeated: an OUT that is there already is left as it is; a lost
# node starts them again.
#SBATCH --job-name=lbr-eval
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
trap : USR1 # of SBATCH_SIGNAL: an evaluation cannot stop half-way, and uses what is left of its time

[ $# -gt 0 ] || die "no model: sbatch slurm/eval.sh MODEL ... --data SET [-- OUT]"
model=$1 evaluation=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  evaluation+=("$1")
  shift
done
[ $# = 0 ] || shift
if [ $# -gt 0 ] && [ -n "$(ls -A -- "$1" 2>/dev/null)" ]; then
  echo "lbr: $1 is there already: nothing is exported; move it away to export anew" >&2
  set --
fi
on_first_node -m lbr_dist eval "${evaluation[@]}"
[ $# = 0 ] || on_first_node -m lbr_dist export "$model" "$@"
