#!/usr/bin/env bash
# Run a command again after a crash:
#   MAX_RESTARTS=10 PAUSE_SECONDS=120 docs/launch/restart.sh COMMAND [ARGUMENT ...]
# - Status 0 of the command ends the script with status 0.
# - Any other status restarts the command after the pause, at most MAX_RESTARTS times; then the script ends with that status.
# - SIGTERM, SIGINT or SIGHUP to this script is passed on as SIGTERM, and the command is not restarted. The script ends with the status of the
#   command, or with 143 if that is 0: the run has been saved, but a scheduler must not take it for finished.
# The pause is longer than the 100 seconds after which the other processes of a run notice that one has died. Otherwise the first
# process to restart would find those of the old run.
set -uo pipefail
limit=${MAX_RESTARTS:-10} pause=${PAUSE_SECONDS:-120}
number="^(0|[1-9][0-9]*)$"
if (($# == 0)) || ! [[ $limit =~ $number && $pause =~ $number ]]; then
  echo "Expected a command, and whole numbers for MAX_RESTARTS ($limit) and PAUSE_SECONDS ($pause)" >&2
  exit 2
fi
stopped="" child=""
# The command gets a process group of its own. Otherwise Ctrl-C would send it one signal directly and another one through this
# script, and a second signal ends a run without saving.
set -m

report() { echo "$(date -u +%FT%TZ) restart.sh: $*" >&2; }

forward() {
  stopped=yes
  if [[ $child ]]; then kill -TERM "$child" 2>/dev/null; fi
}
trap forward TERM INT HUP

# Run in the background, so that signals are handled while the child runs, and wait. A signal interrupts the wait.
run() {
  "$@" &
  child=$!
  if [[ $stopped ]]; then kill -TERM "$child"; fi
  while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do :; done
  child=""
}

for ((restarts = 0; ; restarts++)); do
  run "$@"
  if [[ $stopped ]]; then
    report "stopped, the command ended with status $status"
    exit $((status == 0 ? 143 : status))
  fi
  if ((status == 0 || restarts >= limit)); then
    report "the command ended with status $status after $restarts restarts"
    exit "$status"
  fi
  report "the command ended with status $status; restart $((restarts + 1)) of $limit in $pause seconds"
  command_status=$status
  run sleep "$pause"
  if [[ $stopped ]]; then exit "$command_status"; fi
done
