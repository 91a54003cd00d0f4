# shellcheck shell=bash
# What the job scripts share. They trap, start and wait; what is to be decided is decided, and tested, in
# lbr_dist/launch/slurm.py. Sourced, with LBR_HOME set, inside a job.

set -euo pipefail

die() { echo "error: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || die "not in a Slurm job: submit this script with sbatch"
# shellcheck source=slurm/site.env
. "${LBR_SITE:-$LBR_HOME/slurm/site.env}"
if [ -n "$LBR_MODULES" ]; then
  read -ra modules <<<"$LBR_MODULES"
  module load "${modules[@]}"
fi
export LBR_HOME PYTHONPATH="$LBR_HOME${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# ------------------------------------------------------------------------------------- where, and in which container ---

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ranks=${LBR_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
cpus=$((SLURM_CPUS_ON_NODE / ranks > 0 ? SLURM_CPUS_ON_NODE / ranks : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}

pyxis=() python=()
case $LBR_CONTAINER in
  --*) read -ra pyxis <<<"$LBR_CONTAINER" ;;
  *) read -ra python <<<"$LBR_CONTAINER" ;;
esac
python+=("$LBR_PYTHON")
steps=(srun --kill-on-bad-exit=0 --overlap "${pyxis[@]}")

here() { # here -m MODULE ...: a short Python command, in the container, on this node
  if [ "${#pyxis[@]}" -gt 0 ]; then
    "${steps[@]}" --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" "${python[@]}" "$@"
  else
    "${python[@]}" "$@"
  fi
}

on_first_node() { # on_first_node -m MODULE ...: a command that works on one node, with all of its resources
  "${steps[@]}" --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --nodelist="${hosts[0]}" "${python[@]}" "$@"
}

# ------------------------------------------------------------------------------------------------------- signals ---

asked='' cancelled='' main=''

on_usr1() { # the time limit is near, or somebody asks: the ranks finish their step, write a checkpoint and end with 75
  [ -z "$asked" ] || return 0
  asked=1
  echo "lbr: asked to stop" >&2
  requeue_before_the_limit &
  [ -z "$main" ] || kill -s USR1 "$main" 2>/dev/null || true
}
on_term() { # cancelled or preempted: Slurm has told every process of the job, and decides about the rest
  cancelled=1
}

requeue_before_the_limit() { # ranks that hang, or save for too long, must not cost the job its place
  local end
  end=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
  end=$(date -d "$end" +%s 2>/dev/null) || return 0 # no limit
  while [ "$(date +%s)" -lt "$((end - 10))" ]; do
    kill -0 "$$" 2>/dev/null || return 0 # the script has ended
    sleep 1
  done
  echo "lbr: not stopped in time; requeued, to go on from the newest checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID"
}

supervise() { # supervise COMMAND ...: run it, with signals passed on; its exit code is then in $code
  local status
  "$@" &
  main=$!
  [ -z "$asked" ] || kill -s USR1 "$main"
  while :; do # a signal ends `wait` with 128 + n while the command still runs
    status=0
    wait "$main" || status=$?
    code=$status
    if [ "$status" -le 128 ] || ! kill -0 "$main" 2>/dev/null; then break; fi
  done
  status=0
  wait "$main" 2>/dev/null || status=$? # remembered by bash, should the signal have come with the end
  [ "$status" = 127 ] || code=$status
  main=''
}

# -------------------------------------------------------------------------------------------------------- training ---

train() { # train STAGE RECIPE [key=value ...]
  local stage=$1 ports output code verdict
  shift
  [ $# -gt 0 ] || die "no recipe: sbatch slurm/... RECIPE [key=value ...]"
  trap on_usr1 USR1
  trap on_term TERM
  echo "lbr: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${hosts[*]}" >&2
  ports=$(here -m lbr_dist.launch.slurm begin --stage "$stage" --ports 4 "$@") || exit
  read -ra ports <<<"$ports"
  output=$(here -m lbr_dist.launch.slurm output "$@")
  export MASTER_ADDR="${hosts[0]}" MASTER_PORT="${ports[0]}"

  supervise check_nodes "$output"
  if [ "$code" = 0 ] && [ -n "$asked" ]; then
    code=75 # before there was a run
  elif [ "$code" = 0 ] && [ -z "$cancelled" ]; then
    case $LAUNCHER in
      srun) supervise launch_srun "$@" ;;
      torchrun) supervise launch_torchrun "$@" ;;
      ray)
        start_ray "${ports[@]}"
        supervise wait_for_ray
        if [ "$code" = 0 ] && [ -n "$asked" ]; then
          code=75 # before there was a run
        elif [ "$code" = 0 ]; then
          supervise launch_ray "$stage" "$@"
        fi
        ;;
      *) die "LAUNCHER=$LAUNCHER: expected srun, torchrun or ray" ;;
    esac
  fi
  if [ -n "$cancelled" ]; then
    echo "lbr: cancelled or preempted" >&2
    exit 143
  fi
  verdict=$(here -m lbr_dist.launch.slurm end --code "$code" ${asked:+--asked} "$@") || exit
  if [ "$verdict" = requeue ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  exit "$code"
}

check_nodes() { # check_nodes FOLDER: every node answers, and sees the same files
  exec "${steps[@]}" --ntasks-per-node=1 "${python[@]}" -m lbr_dist slurm check --quick --shared "$LBR_SHARED" --shared "$1"
}

# Once a rank has ended, the others get a minute to end as well: time for a last message, and no wait for a dead rank.
launch_srun() {
  exec "${steps[@]}" --wait=60 --ntasks="$((ranks * ${#hosts[@]}))" --ntasks-per-node="$ranks" --cpus-per-task="$cpus" \
    "${python[@]}" -m lbr_dist train "$@"
}

launch_torchrun() {
  exec "${steps[@]}" --wait=60 --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    "${python[@]}" -m lbr_dist.launch.torchrun \
    --nnodes "${#hosts[@]}" --nproc-per-node "$ranks" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
    -m lbr_dist train "$@"
}

start_ray() { # start_ray PORT DASHBOARD CLIENT AGENT: a Ray cluster of the allocation's nodes, for this start of the job
  local address=127.0.0.1
  if [ "${#hosts[@]}" -gt 1 ]; then
    read -r address _ < <(getent ahostsv4 "${hosts[0]}") || die "${hosts[0]}: no IPv4 address (getent ahostsv4)"
  else
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # on Linux: loopback stays loopback
  fi
  export RAY_ADDRESS="$address:$1" RAY_AUTH_MODE=token RAY_AUTH_TOKEN
  RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
  export LBR_GPUS=${SLURM_GPUS_ON_NODE:-0} LBR_RAY_FOLDER="$LBR_SCRATCH/ray-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
  export RAY_worker_niceness=0 # Ray's 15 would leave the ranks what others do not want
  unset MASTER_ADDR MASTER_PORT # Ray Train has its own
  mkdir -p "$output/ray"
  "${steps[@]}" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    "${python[@]}" -m lbr_dist.launch.slurm_ray node "$@" >>"$output/ray/nodes-$SLURM_JOB_ID.log" 2>&1 &
}

wait_for_ray() {
  exec "${steps[@]}" --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" \
    "${python[@]}" -m lbr_dist.launch.slurm_ray wait "${#hosts[@]}"
}

launch_ray() { # launch_ray STAGE RECIPE [key=value ...]
  local driver=stage1
  [ "$1" = generative ] || driver=stage2
  shift
  exec "${steps[@]}" --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" "${python[@]}" "$LBR_HOME/ray_jobs/$driver.py" "$@" \
    --num-workers "$((ranks * ${#hosts[@]}))" --cpus-per-worker "$cpus"
}
