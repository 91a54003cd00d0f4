# shellcheck shell=bash
# What the job scripts share. They trap, start and wait; what is to be decided is decided, and tested, in
# lbr_dist/launch/slurm.py. Sourced, with LBR_HOME set, inside a job.

set -euo pipefail

# shellcheck source=slurm/read_site.sh
. "$LBR_HOME/slurm/read_site.sh"
[ -n "${SLURM_JOB_ID:-}" ] || die "not in a Slurm job: submit this script with sbatch"
# What the shell that submitted leaves, maybe inside a step of another job: srun would bind, place and limit our tasks as
# that step's, refuse them, or report otherwise how they ended. Before site.env, which may say what is wanted here.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" SLURM_GPU_BIND SLURM_TRES_BIND SLURM_DISTRIBUTION SLURM_DIST_PLANESIZE \
  SLURM_HOSTFILE SLURM_HINT SLURM_EXCLUSIVE SLURM_EXACT SLURM_OVERCOMMIT SLURM_THREADS SLURM_THREADS_PER_CORE \
  SLURM_CORE_SPEC SLURM_THREAD_SPEC SLURM_NTASKS_PER_{CORE,SOCKET,GPU,TRES} SLURM_NSOCKETS_PER_NODE \
  SLURM_NCORES_PER_SOCKET SLURM_GPUS_PER_NODE SLURM_GRES SLURM_GRES_FLAGS SLURM_STEP_GRES SLURM_CONSTRAINT \
  SLURM_CLUSTER_CONSTRAINT SLURM_ACCOUNT SLURM_PARTITION SLURM_QOS SLURM_RESERVATION SLURM_DEPENDENCY SLURM_IMMEDIATE \
  SLURM_TIMELIMIT SLURM_SIGNAL SLURM_RESV_PORTS SLURM_WORKING_DIR SLURM_REMOTE_CWD SLURM_BCAST SLURM_TEST_EXEC \
  SLURM_STD{IN,OUT,ERR}MODE SLURM_LABELIO SLURM_EXIT_ERROR SLURM_EXIT_IMMEDIATE SRUN_CPUS_PER_TASK SRUN_EXPORT_ENV \
  "${!SQUEUE_@}"
read_site
export LBR_HOME PYTHONPATH="$LBR_HOME${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# ------------------------------------------------------------------------------------- where, and in which container ---

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ranks=${LBR_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "LBR_RANKS_PER_NODE=$ranks: expected a whole number from 1"
node_cpus=$(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-$SLURM_CPUS_ON_NODE}" | sed 's/(.*//' | sort -n | sed -n 1p) # "8(x2),6"
cpus=$((node_cpus / ranks > 0 ? node_cpus / ranks : 1)) # as the smallest node has them
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}

pyxis=() python=()
case $LBR_CONTAINER in
  --*) read -ra pyxis <<<"$LBR_CONTAINER" ;;
  *) read -ra python <<<"$LBR_CONTAINER" ;;
esac
python+=("$LBR_PYTHON")

# srun takes the options of the job for its own, and with --export=NONE it would pass no environment on. What a step is to
# have is said with the step; all of them may use all of the job's GPUs.
unset SLURM_EXPORT_ENV SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK \
  SLURM_GPUS SLURM_GPUS_PER_TASK SLURM_GPUS_PER_SOCKET SLURM_CPUS_PER_GPU SLURM_MEM_PER_GPU
# And what is left of the shell that submitted, maybe in an allocation of its own: every task would take itself for its rank;
# of two kinds of memory one is not this job's, and srun takes only one.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
[ -z "${SLURM_MEM_PER_CPU:-}" ] || [ -z "${SLURM_MEM_PER_NODE:-}" ] || unset SLURM_MEM_PER_CPU SLURM_MEM_PER_NODE
steps=(srun --kill-on-bad-exit=0 --overlap ${SLURM_GPUS_ON_NODE:+"--gpus-per-node=$SLURM_GPUS_ON_NODE"} "${pyxis[@]}")
everywhere=(--nodes="${#hosts[@]}" --ntasks="${#hosts[@]}" --ntasks-per-node=1)

here() { # here -m MODULE ...: a short Python command, in the container, on this node
  if [ "${#pyxis[@]}" -gt 0 ]; then
    "${steps[@]}" --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" "${python[@]}" "$@"
  else
    "${python[@]}" "$@"
  fi
}

on_first_node() { # on_first_node -m MODULE ...: a command that works on one node, with all of its resources
  "${steps[@]}" --nodes=1 --ntasks=1 --cpus-per-task="$node_cpus" --nodelist="${hosts[0]}" "${python[@]}" "$@" ||
    failed "$?"
}

failed() { # failed CODE: end as a command of the package did, unless Python could not even begin it
  [ "$1" = 2 ] || here -c 'import lbr_dist.cli' >/dev/null 2>&1 ||
    die "LBR_PYTHON=$LBR_PYTHON cannot run lbr_dist on ${hosts[0]}, as said above: activate the environment in which it is" \
      "installed before sbatch, or set LBR_PYTHON to its Python (slurm/site.env; there LBR_MODULES and LBR_CONTAINER, too)"
  exit "$1"
}

# ------------------------------------------------------------------------------------------------------- signals ---

asked='' cancelled='' main='' output=''
job=$SLURM_JOB_ID # for commands
# The number of an array's last task also means the whole array. Any other number is one job's, whatever array the job
# that submitted this one was in.
[ "${SLURM_ARRAY_JOB_ID:-}" != "$job" ] || job+=_$SLURM_ARRAY_TASK_ID

on_usr1() { # the time limit is near, or somebody asks: the ranks finish their step, write a checkpoint and end with 75
  [ -z "$asked" ] || return 0
  asked=1
  echo "lbr: asked to stop" >&2
  requeue_before_the_limit &
  write_down # before the signal: ranks that are still to be started do not get it, and look here
  [ -z "$main" ] || kill -s USR1 "$main" 2>/dev/null || true
}
write_down() { # that this start of the job was asked to stop
  [ -n "$output" ] || return 0 # before there was a run
  { mkdir -p "$output/asked" && : >"$output/asked/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"; } 2>/dev/null || true
}
on_term() { # cancelled or preempted: Slurm has told every process of the job; or the node shuts down
  cancelled=1
}

state() { # of the job; nothing while Slurm's controller does not answer
  squeue -h -j "$job" -o %T 2>/dev/null || true
}

requeue() { # a controller that is being replaced is away for a minute or two; a site may refuse
  local try
  for try in {1..10}; do
    case $(state) in
      RUNNING) ! scontrol requeue "$job" || return 0 ;;
      ?*) return 1 ;; # Slurm has decided otherwise
    esac
    [ "$try" = 10 ] || sleep "${LBR_REQUEUE_S:-15}"
  done
  return 1
}

requeue_before_the_limit() { # ranks that hang, or save for too long, must not cost the job its place
  local end
  end=$(TZ=UTC0 SLURM_TIME_FORMAT=standard scontrol show job -o "$job" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
  end=$(date -u -d "$end" +%s 2>/dev/null) || return 0 # no limit
  while [ "$(date +%s)" -lt "$((end - 10))" ]; do
    kill -0 "$$" 2>/dev/null || return 0 # the script has ended
    sleep 1
  done
  echo "lbr: not stopped in time; to be requeued, to go on from the newest checkpoint" >&2
  requeue
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
  local stage=$1 argument begun ports code verdict
  shift
  [ $# -gt 0 ] || die "no recipe: sbatch slurm/... RECIPE [key=value ...]"
  for argument in "$@"; do
    [[ $argument != -* || ${argument%%=*} =~ ^--(resume|allow-change|then)$ ]] ||
      die "$argument: not an option of the job scripts: they take RECIPE [key=value ...] [--resume X] [--allow-change KEY]" \
        "[--then STAGE2]; sbatch's options go before the script, and ranks on each node are LBR_RANKS_PER_NODE"
  done
  [[ $LAUNCHER =~ ^(srun|torchrun|ray)$ ]] || die "LAUNCHER=$LAUNCHER: expected srun, torchrun or ray"
  [ "$LAUNCHER" = torchrun ] || [ "$ranks" -le "$node_cpus" ] || # others give each rank a CPU of its own
    die "$ranks ranks on each node, of which the job has $node_cpus CPUs: ask for more, or set LBR_RANKS_PER_NODE"
  trap on_usr1 USR1
  trap on_term TERM
  echo "lbr: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${hosts[*]}" >&2
  begun=$(here -m lbr_dist.launch.slurm begin --stage "$stage" --ports 4 "$@") || failed "$?"
  [[ ${begun//$'\n'/ } =~ ^([0-9]+\ ){3}[0-9]+(\ auto)?$ ]] ||
    die "LBR_PYTHON=$LBR_PYTHON prints more than it is asked for ('${begun%%$'\n'*}'): see that it and LBR_CONTAINER run" \
      "Python and write nothing to stdout themselves"
  read -ra ports <<<"$begun" # its first line
  [[ $begun != *auto ]] || set -- "$@" --resume auto # the last one counts
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
    esac
  fi
  if [ -n "$cancelled" ] && [ "$(state)" != RUNNING ]; then
    echo "lbr: cancelled or preempted" >&2
    exit 143
  fi
  verdict=$(here -m lbr_dist.launch.slurm end --code "$code" ${asked:+--asked} --output "$output" "$@") || exit
  [ "$verdict" = complete ] || [ "$code" != 0 ] || code=1 # srun's word, where a node was lost
  [ "$verdict" != mistake ] || code=2                     # and where another node or rank hung
  if [ "$verdict" = requeue ]; then
    if requeue; then exit 0; fi
    echo "lbr: Slurm did not requeue the job: submit the same line again, it goes on from the newest checkpoint" >&2
  fi
  exit "$code"
}

check_nodes() { # check_nodes FOLDER: every node answers, and sees the same files
  trap '' USR1 # it is soon done; a node whose task were ended by the signal would be called bad
  # A node that hangs is not waited for. One without Python ends at once, and the first one, which has to name it, may need
  # a minute for that, and more where the file system is slow.
  "${steps[@]}" --wait=300 "${everywhere[@]}" \
    "${python[@]}" -m lbr_dist slurm check --quick --shared "$LBR_SHARED" --shared "$1"
}

# Once a rank has ended, the others get a minute to end as well: time for a last message, and no wait for a dead rank.
launch_srun() {
  exec "${steps[@]}" --wait=60 --nodes="${#hosts[@]}" --ntasks="$((ranks * ${#hosts[@]}))" --ntasks-per-node="$ranks" \
    --cpus-per-task="$cpus" "${python[@]}" -m lbr_dist train "$@"
}

launch_torchrun() {
  exec "${steps[@]}" --wait=60 "${everywhere[@]}" --cpus-per-task="$node_cpus" \
    "${python[@]}" -m lbr_dist.launch.torchrun \
    --nnodes "${#hosts[@]}" --nproc-per-node "$ranks" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
    -m lbr_dist train "$@"
}

start_ray() { # start_ray PORT DASHBOARD CLIENT AGENT: a Ray cluster of the allocation's nodes, for this start of the job
  local address=127.0.0.1
  if [ "${#hosts[@]}" -gt 1 ]; then
    # what other nodes reach: by its own name a Debian machine is 127.0.1.1
    address=$(here -c 'from sys import argv
from lbr_dist.launch.ray_start import address_towards
print(address_towards(argv[1]))' "${hosts[1]}:1") || die "${hosts[0]}: has no IPv4 address that faces ${hosts[1]}"
    [[ $address != 127.* ]] || die "${hosts[0]}: the name ${hosts[1]} leads to $address there: mend its /etc/hosts"
  else
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # on Linux: loopback stays loopback
  fi
  export RAY_ADDRESS="$address:$1" RAY_AUTH_MODE=token RAY_AUTH_TOKEN
  RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
  export LBR_GPUS=${SLURM_GPUS_ON_NODE:-0} LBR_RAY_FOLDER="$LBR_SCRATCH/ray-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
  export RAY_worker_niceness=0 # Ray's 15 would leave the ranks what others do not want
  export RAY_prestart_worker_first_driver=0 # a Python for each of a node's CPUs, when the ranks want them
  unset MASTER_ADDR MASTER_PORT # Ray Train has its own
  mkdir -p "$output/ray"
  nodes="$output/ray/nodes-$SLURM_JOB_ID"
  rm -f "$nodes.code"
  {
    local status=0
    "${steps[@]}" "${everywhere[@]}" --cpus-per-task="$node_cpus" \
      "${python[@]}" -m lbr_dist.launch.slurm_ray node "$nodes" "$@" >>"$nodes.log" 2>&1 || status=$?
    echo "$status" >"$nodes.code"
  } &
}

wait_for_ray() {
  exec "${steps[@]}" --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" \
    "${python[@]}" -m lbr_dist.launch.slurm_ray wait "$nodes" "${#hosts[@]}"
}

launch_ray() { # launch_ray STAGE RECIPE [key=value ...]
  local driver=stage1
  [ "$1" = generative ] || driver=stage2
  shift
  exec "${steps[@]}" --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" "${python[@]}" "$LBR_HOME/ray_jobs/$driver.py" "$@" \
    --num-workers "$((ranks * ${#hosts[@]}))" --cpus-per-worker "$cpus"
}
