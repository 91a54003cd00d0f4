# shellcheck shell=bash
# Reads the settings of the cluster, for the job scripts and for the pipeline. Sourced, with LBR_HOME set.

die() { echo "error: $*" >&2; exit 2; }

site=${LBR_SITE:-$LBR_HOME/slurm/site.env}
[ -f "$site" ] && [ -r "$site" ] || die "$site, the settings of the cluster, cannot be read: mend LBR_SITE, or unset it"
! grep -q $'\r' "$site" || die "$site: has the line ends of Windows: sed -i 's/\\r\$//' $site"

source_site() { # where a command in it fails, that is told; a last one that is only false, as `[ -f x ] && . x`, may be
  local lbr_depth=${#BASH_SOURCE[@]} lbr_shell=$BASHPID
  set -E
  trap '[ "$BASHPID" != "$lbr_shell" ] || die "$site: a command in it failed: mend it, or put || true behind it"' ERR
  trap '[ "${#BASH_SOURCE[@]}" != "$lbr_depth" ] || { trap - ERR; set +e; }' RETURN # as $site itself ends
  # shellcheck source=slurm/site.env
  . "$site"
  trap - ERR RETURN
  set -e +E
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
  module load "${modules[@]}" || die "LBR_MODULES=$LBR_MODULES: module load failed with $?"
}
