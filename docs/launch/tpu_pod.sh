#!/usr/bin/env bash
# Train on all hosts of a TPU slice, from creating the machines to deleting them. docs/many_hosts.md explains each step.
#   docs/launch/tpu_pod.sh create NAME ZONE TYPE VERSION [--spot] [other flags of gcloud]
#   docs/launch/tpu_pod.sh state NAME ZONE
#   docs/launch/tpu_pod.sh setup NAME ZONE [BUCKET]
#   docs/launch/tpu_pod.sh check NAME ZONE --config=CONFIG --workdir=gs://BUCKET/RUN [--config.KEY=VALUE ...]
#   docs/launch/tpu_pod.sh start NAME ZONE --config=CONFIG --workdir=gs://BUCKET/RUN [--config.KEY=VALUE ...]
#   docs/launch/tpu_pod.sh status|logs|stop|delete NAME ZONE
# setup clones REPOSITORY, by default the origin of this clone, on every host, and mounts BUCKET at /mnt/BUCKET.
# start returns at once. A crashed run is restarted up to MAX_RESTARTS times (default: 10), with PAUSE_SECONDS (120) in between.
# All commands but create and delete may be repeated.
set -euo pipefail
if (($# < 3)); then
  echo "Expected one of create, state, setup, check, start, status, logs, stop, delete, with a name and a zone; see the head of $0" >&2
  exit 2
fi
action=$1 name=$2 zone=$3
shift 3
if [[ $name == -* || $zone == -* ]]; then
  echo "Expected $action NAME ZONE, got $name $zone" >&2
  exit 2
fi

resource() { gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" "${@:2}"; }
on_hosts() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"; }
in_clone() { printf "cd dat_jax &&" && printf " %q" "$@"; } # a command with its words quoted for the shell of the hosts
host=(bash docs/launch/tpu_host.sh)
limits=("MAX_RESTARTS=${MAX_RESTARTS:-10}" "PAUSE_SECONDS=${PAUSE_SECONDS:-120}")

case $action in
create)
  resource create --node-id="$name" --accelerator-type="${1:?the type, such as v5litepod-64}" \
    --runtime-version="${2:?the runtime version, such as v2-alpha-tpuv5-lite}" "${@:3}"
  ;;
state) resource describe --format="value(state.state)" ;;
setup)
  if (($#)) && ! [[ $1 =~ ^[a-z0-9][a-z0-9._-]+$ ]]; then
    echo "Expected the name of a bucket without gs://, got $1" >&2
    exit 2
  fi
  repository=${REPOSITORY-$(git -C "$(dirname "$0")" remote get-url origin 2>/dev/null || true)}
  : "${repository:?set REPOSITORY to the address of this repository}"
  quoted=$(printf %q "$repository")
  on_hosts all "if test -d dat_jax; then git -C dat_jax pull --quiet; else git clone --quiet --depth=1 $quoted dat_jax; fi"
  on_hosts all "$(in_clone "${host[@]}" setup "$@")"
  ;;
check)
  : "${1:?the flags of dat_jax.check}"
  on_hosts all "$(in_clone .venv/bin/python -m dat_jax.check --distributed=on "$@")"
  ;;
start)
  : "${1:?the flags of dat_jax.main}"
  on_hosts all "$(in_clone env "${limits[@]}" "${host[@]}" start "$@")"
  ;;
status | stop) on_hosts all "$(in_clone "${host[@]}" "$action")" ;;
logs) on_hosts 0 "$(in_clone "${host[@]}" logs)" ;; # only the first process logs
delete) resource delete --force --quiet ;;
*)
  echo "Unknown command $action: expected create, state, setup, check, start, status, logs, stop or delete" >&2
  exit 2
  ;;
esac
