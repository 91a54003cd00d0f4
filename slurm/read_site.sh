# shellcheck shell=bash
# Reads the settings of the cluster, for the job scripts and for the pipeline. Sourced, with LBR_HOME set.

die() { echo "error: $*" >&2; exit 2; }

help_if_asked() { # help_if_asked ARGUMENT ...: what the script's own first lines say
  local argument
  for argument in "$@"; do
    [[ $argument =~ ^(-h|--help)$ ]] || continue
    sed -nE '1d; /^(#SBATCH|[^#]|$)/q; s/^# ?//p' "$0"
    exit 0
  done
}
help_if_asked "$@"

site=${LBR_SITE:-$LBR_HOME/slurm/site.env}
[ -f "$site" ] && [ -r "$site" ] || die "$site, the settings of the cluster, cannot be read: mend LBR_SITE, or unset it"
! grep -q $'\r' "$site" || die "$site: has the line ends of Windows: sed -i 's/\\r\$//' $site"

bad_site() { lbr_in_site=''; die "$site: $*"; }

source_site() { # where a command in it fails, that is told; a last one that is only false, as `[ -f x ] && . x`, may be
  local lbr_depth=${#BASH_SOURCE[@]} lbr_shell=$BASHPID
  lbr_in_site=1
  set -E +u # what it sources in turn, as a profile, may ask for what is not set
  trap '[ -z "$lbr_in_site" ] || bad_site "ends the script that reads it: mend what is said above, or write return for exit"' EXIT
  trap '[ "$BASHPID" != "$lbr_shell" ] || bad_site "a command in it failed: mend it, or put || true behind it"' ERR
  trap '[ "${#BASH_SOURCE[@]}" != "$lbr_depth" ] || { trap - ERR; set +e; }' RETURN # as $site itself ends
  # shellcheck source=slurm/site.env
  . "$site"
  lbr_in_site=''
  trap - ERR RETURN
  set -eu +E
}

read_site() { # all settings, and the modules that they name
  local name modules
  # shellcheck disable=SC2034 # site.env asks for it
  lbr_script=1
  source_site
  for name in LAUNCHER LBR_{RANKS_PER_NODE,MAX_RESTARTS,MODULES,PYTHON,LOGIN_PYTHON,CONTAINER,SHARED,SCRATCH}; do
    [ -n "${!name+set}" ] || die "$site: does not set $name: begin with a copy of slurm/site.env"
  done
  [ -n "$LBR_MODULES" ] || return 0
  command -v module >/dev/null || die "LBR_MODULES=$LBR_MODULES: no command 'module' here: source what defines it in $site"
  read -ra modules <<<"$LBR_MODULES"
  set +u # a module's scripts may ask for what is not set
  module load "${modules[@]}" || die "LBR_MODULES=$LBR_MODULES: module load failed with $?"
  set -u
}
