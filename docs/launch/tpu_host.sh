#!/usr/bin/env bash
# Called by tpu_pod.sh on every host of a TPU slice, in a clone of the repository:
#   tpu_host.sh setup [BUCKET] | start FLAG ... | status | logs | stop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
log=$HOME/dat_jax.log pid_file=$HOME/dat_jax.pid

is_running() { # after a reboot, another program may have the number in the file
  [[ -s $pid_file ]] && tr "\0" " " 2>/dev/null <"/proc/$(<"$pid_file")/cmdline" | grep -q "restart.sh .*dat_jax.main"
}

install_package() {
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  [[ -x .venv/bin/python ]] || uv venv --python=3.12 .venv # the images come with Python 3.10
  uv pip install --quiet --python=.venv/bin/python --editable '.[train,tpu,gcs]'
}

install_gcsfuse() {
  local version=${GCSFUSE_VERSION:-3.4.0} package
  package=$(mktemp --suffix=.deb)
  curl --fail --silent --show-error --location --output "$package" \
    "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$version/gcsfuse_${version}_amd64.deb"
  chmod a+r "$package"
  sudo apt-get install -qq -y -o DPkg::Lock::Timeout=300 "$package"
}

mount_bucket() {
  local place=/mnt/$1
  if mountpoint -q "$place"; then return; fi
  command -v gcsfuse >/dev/null || install_gcsfuse
  sudo mkdir -p "$place"
  sudo chown "$(id -u)" "$place"
  gcsfuse -o ro --implicit-dirs "$1" "$place"
}

start() {
  exec 9>>"$log.lock"
  flock 9 # another start at the same time waits
  if is_running; then
    echo "$HOSTNAME: already running"
    return
  fi
  # Detached from this session, so that it survives its end. Its terminal may be closed before setsid has run: hence the trap.
  trap "" HUP
  setsid bash docs/launch/restart.sh .venv/bin/python -m dat_jax.main --distributed=on "$@" >>"$log" 2>&1 </dev/null 9>&- &
  if ! echo $! >"$pid_file"; then
    kill -KILL $!
    exit 1
  fi
  until is_running || ! kill -0 $! 2>/dev/null; do sleep 0.1; done # so that another start finds it
  echo "$HOSTNAME: started, log in $log"
}

stop() {
  if is_running; then
    kill -TERM "$(<"$pid_file")"
    tail --pid="$(<"$pid_file")" --sleep-interval=0.1 --follow /dev/null # until the run is saved
  fi
  echo "$HOSTNAME: stopped"
}

action=${1-}
shift || true
case $action in
setup)
  install_package
  if (($#)); then mount_bucket "$1"; fi
  ;;
start) start "$@" ;;
status)
  echo "$HOSTNAME: $(is_running && echo running || echo not running); $(tail --lines=1 "$log" 2>/dev/null || true)"
  ;;
logs) exec tail --lines=50 --follow "$log" ;;
stop) stop ;;
*)
  echo "Expected setup, start, status, logs or stop, got ${action:-nothing}" >&2
  exit 2
  ;;
esac
