#!/usr/bin/env bash
# The whole path, as a chain of jobs:   slurm/pipeline.sh [sbatch options] STAGE1.yaml STAGE2.yaml [OUT] [--tokens N]
# To be run where sbatch is, not by sbatch. Stage 2 starts from stage 1's run whatever its recipe says, and what it needs
# is checked before stage 1 begins; the evaluation is on the first set of its recipe; OUT is the exported model (default:
# model/ in stage 2's run), with --tokens as for `lbr export`. The sbatch options (--nodes=4 --time=24:00:00, each one word)
# go to the two training jobs; a --dependency is the first one's alone. A job of the chain starts when the one before it
# has ended well; if that fails for good, those after it are cancelled. Of several clusters (--clusters), all three go to
# the one that takes the first: a job depends on jobs of its own cluster only.

set -euo pipefail

LBR_HOME=${LBR_HOME:-$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)}
export LBR_HOME
[ -r "$LBR_HOME/slurm/read_site.sh" ] ||
  { echo "error: no slurm/read_site.sh in $LBR_HOME: run slurm/pipeline.sh, do not submit it; or mend LBR_HOME" >&2; exit 2; }
# shellcheck source=slurm/read_site.sh
. "$LBR_HOME/slurm/read_site.sh"
source_site >&2 # what sbatch reads; the jobs read the rest for themselves

options=()
while [ $# -gt 0 ] && [[ $1 == -* ]]; do
  [ "$1" != --test-only ] || die "--test-only submits no job to wait for: test slurm/stage1.sh and stage2.sh, one by one"
  options+=("$1")
  shift
done
usage="usage: slurm/pipeline.sh [sbatch options] STAGE1.yaml STAGE2.yaml [OUT] [--tokens N]"
[ $# -ge 2 ] || die "$usage"
recipe1=$1 recipe2=$2 out=''
shift 2
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  out=$1
  shift
fi
case "$#:${1:-}" in
  0: | 2:--tokens | 1:--tokens=*) ;;
  *) die "$usage" ;;
esac

ask() ( # ask WHAT RECIPE ...: what recipes say, with the Python of the jobs if it runs here
  read_site >&2 # a module may talk
  case $LBR_CONTAINER in
    --*) python=("$LBR_LOGIN_PYTHON") ;;
    *)
      read -ra python <<<"$LBR_CONTAINER"
      python+=("$LBR_PYTHON")
      ;;
  esac
  PYTHONPATH="$LBR_HOME${PYTHONPATH:+:$PYTHONPATH}" "${python[@]}" -m lbr_dist.launch.slurm "$@"
)

jobs=() cluster=()
undo() { # half a chain would train, and nobody would know
  [ "${#jobs[@]}" = 0 ] || { scancel "${cluster[@]}" "${jobs[@]}" && echo "error: not submitted whole; cancelled: ${jobs[*]}" >&2; }
}

found=$(ask chain --then "$recipe2" ${out:+--out "$out"} "$recipe1" "$@")
mapfile -t found <<<"$found"
[ "${#found[@]}" = 4 ] || die "the Python of the jobs prints more than it is asked for ('${found[0]}'): see that LBR_PYTHON" \
  "(LBR_LOGIN_PYTHON with Pyxis) and LBR_CONTAINER run Python and write nothing to stdout themselves"
first=${found[0]} second=${found[1]} data=${found[2]} start=${found[3]}
out=${out:-$second/model}
# What counts is the last --dependency: the options' own come before it.
after() { echo "--dependency=afterok:$1" --kill-on-invalid-dep=yes; }

trap undo EXIT
one=$(sbatch --parsable "${options[@]}" "$LBR_HOME/slurm/stage1.sh" "$recipe1" --then "$recipe2")
[[ $one != *";"* ]] || cluster=("--clusters=${one#*;}") # where one was asked for: JOB;CLUSTER
one=${one%%;*}
jobs+=("$one")
read -ra chained <<<"$(after "$one")"
two=$(sbatch --parsable "${options[@]}" "${cluster[@]}" "${chained[@]}" "$LBR_HOME/slurm/stage2.sh" "$recipe2" "$start")
two=${two%%;*}
jobs+=("$two")
read -ra chained <<<"$(after "$two")"
three=$(sbatch --parsable "${chained[@]}" "${cluster[@]}" "$LBR_HOME/slurm/eval.sh" "$second" --data "$data" -- "$out" "$@")
trap - EXIT
echo "stage 1: job $one -> $first"
echo "stage 2: job $two -> $second"
echo "eval:    job ${three%%;*} -> $second/eval, $out"
