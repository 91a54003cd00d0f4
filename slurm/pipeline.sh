#!/usr/bin/env bash
# The whole path, as a chain of jobs:   slurm/pipeline.sh [sbatch options] STAGE1.yaml STAGE2.yaml [OUT]
# To be run where sbatch is, not by sbatch. Stage 2 starts from stage 1's run whatever its recipe says; the evaluation is
# on the first set of its recipe; OUT is the exported model (default: model/ in stage 2's run). The sbatch options
# (--nodes=4 --time=24:00:00, each one word) go to the two training jobs. A job of the chain starts when the one before
# it has ended well; if that fails for good, those after it are cancelled.

set -euo pipefail

LBR_HOME=${LBR_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export LBR_HOME
# shellcheck source=slurm/site.env
. "${LBR_SITE:-$LBR_HOME/slurm/site.env}"

options=()
while [ $# -gt 0 ] && [[ $1 == -* ]]; do
  options+=("$1")
  shift
done
[ $# -eq 2 ] || [ $# -eq 3 ] || { echo "error: usage: slurm/pipeline.sh [sbatch options] STAGE1.yaml STAGE2.yaml [OUT]" >&2; exit 2; }

read -ra python <<<"$LBR_CONTAINER"
[[ $LBR_CONTAINER != --* ]] || python=()
ask() { PYTHONPATH="$LBR_HOME${PYTHONPATH:+:$PYTHONPATH}" "${python[@]}" "$LBR_PYTHON" -m lbr_dist.launch.slurm "$@"; }

first=$(ask output "$1")
second=$(ask output "$2")
data=$(ask evaluated "$2")
after() { echo "--dependency=afterok:$1" --kill-on-invalid-dep=yes; }

one=$(sbatch --parsable "${options[@]}" "$LBR_HOME/slurm/stage1.sh" "$1")
read -ra chained <<<"$(after "$one")"
two=$(sbatch --parsable "${chained[@]}" "${options[@]}" "$LBR_HOME/slurm/stage2.sh" "$2" "model.start_from=$first")
read -ra chained <<<"$(after "$two")"
three=$(sbatch --parsable "${chained[@]}" "$LBR_HOME/slurm/eval.sh" "$second" --data "$data" -- "${3:-$second/model}")
echo "stage 1: job $one -> $first"
echo "stage 2: job $two -> $second"
echo "eval:    job $three -> $second/eval, ${3:-$second/model}"
