#!/usr/bin/env bash
# Build the environments of this checkout from the hashed lock files:
#   locks/install.sh main [test]    .venv         DEVICE=cpu (the default) or gpu
#   locks/install.sh triton         .venv-triton
# An environment that is up to date costs nothing. One that was built from other locks, by another
# Python, or in another place (the folder was moved or copied) is built anew. Of two calls at once
# the second waits for the first. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
HERE=$(pwd -P)
DEVICE=${DEVICE:-cpu}
NEEDED_GB=8

fail() {
  echo "error: $*" >&2
  exit 1
}

# The server's wheel exists for Python 3.11 and 3.12 with numpy < 2, so the project keeps to these.
find_python() {
  local candidate version found=() candidates=(python3 python3.12 python3.11) said
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if ! version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1); then
      said=${version##*$'\n'}
      [ -z "$(command -v "$candidate")" ] || found+=("$candidate fails: $said")
      continue
    fi
    case $version in
      3.11 | 3.12)
        "$candidate" -c 'import os, sys; print(os.path.realpath(sys.executable))'
        return
        ;;
    esac
    found+=("$candidate is $version")
  done
  fail "Python 3.11 or 3.12 is needed, found $(IFS=,; echo "${found[*]:-none}"): install python3.12" \
    "and name it with make PYTHON=/path/to/python3.12"
}

# The lock of this checkout. The kernel lifts it when this process and those that it started end.
lock() {
  mkdir -p .cache 2>/dev/null && [ -w .cache ] || fail "$HERE cannot be written by this user"
  exec 9>>.cache/install.lock
  "$BASE" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
  echo "waiting for another make in $HERE" >&2
  "$BASE" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
}

# DVC wants to be told where there is no git: in a download, even inside another repository.
tell_dvc() {
  local has_git=yes has_setting=no
  [ -e .git ] || has_git=no
  ! grep -qs '^ *no_scm *=' .dvc/config.local || has_setting=yes
  [ -d .dvc ] && [ $has_git = $has_setting ] || return 0
  "$BASE" - $has_git <<'EOF'
import configparser, sys

config = configparser.RawConfigParser()
config.read(".dvc/config.local", encoding="utf-8")
if sys.argv[1] == "yes":
    config.remove_option("core", "no_scm")
else:
    config.setdefault("core", {})
    config.set("core", "no_scm", "true")
with open(".dvc/config.local", "w", encoding="utf-8") as file:
    config.write(file)
EOF
}

check_disk() {
  local free_mb
  free_mb=$(df -Pm . | awk 'NR == 2 {print $4}')
  [ "$free_mb" -ge $((NEEDED_GB * 1024)) ] || fail "$NEEDED_GB GB of free disk are needed in $HERE" \
    "for the environments and the models, $((free_mb / 1024)).$((free_mb % 1024 * 10 / 1024)) GB" \
    "are free: make room, or clone to another disk"
}

# uv does not read pip's settings: a mirror or a certificate that pip knows is handed on.
hand_on() {
  local value named=${1^^}
  [ -z "${!2:-}" ] || return 0
  named=PIP_${named//-/_} # goes before the files, as pip has it
  if [ -n "${!named:-}" ]; then
    export "$2=${!named}"
    return 0
  fi
  value=$("$BASE" -m pip config list 2>/dev/null | sed -n "s/^[^ ]*\.$1='\(.*\)'\$/\1/p" | tail -n 1) ||
    return 0
  [ -z "$value" ] || export "$2=$value"
}

# uv itself comes by pip, pinned by hash, into a folder of this checkout.
get_uv() {
  local log
  UV=$HERE/.tools/bin/uv
  export UV_LINK_MODE=${UV_LINK_MODE:-hardlink} UV_NO_CONFIG=1
  # Whoever needs others sets uv's own variables.
  hand_on index-url UV_DEFAULT_INDEX
  hand_on cert SSL_CERT_FILE
  export PIP_INDEX_URL=${PIP_INDEX_URL:-${UV_DEFAULT_INDEX:-}}
  [ -n "$PIP_INDEX_URL" ] || unset PIP_INDEX_URL
  local cache=${XDG_CACHE_HOME:-${HOME:-}/.cache}/uv
  if [ -z "${UV_CACHE_DIR:-}" ] && ! { mkdir -p "$cache" && [ -w "$cache" ]; } 2>/dev/null; then
    export UV_CACHE_DIR=$HERE/.cache/uv
  fi
  [ "$(cat .tools/.installed 2>/dev/null)" != "$(cat locks/uv.txt)" ] || return 0
  rm -rf .tools
  "$BASE" -m pip --version >/dev/null 2>&1 ||
    fail "$BASE has no pip, which fetches the installer: install python3-pip (on Debian and" \
      "Ubuntu: apt install python3-pip)"
  if ! log=$(PIP_REQUIRE_VIRTUALENV=0 PIP_USER=0 "$BASE" -m pip install --quiet --disable-pip-version-check --no-input --no-deps \
    --require-hashes --target .tools -r locks/uv.txt 2>&1); then
    fail "pip could not fetch the installer uv: ${log##*$'\n'}; a mirror is named by PIP_INDEX_URL," \
      "a proxy by HTTPS_PROXY"
  fi
  cp locks/uv.txt .tools/.installed
}

# Build or complete an environment: folder, name of the stamp, what it is, installing function.
build() {
  local folder=$1 stamp=$1/.installed-$2 wanted
  wanted=$(printf '%s\n' "$HERE/$folder" "$BASE"; cat "${@:5}")
  [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
  [ "$stamp" != .venv/.installed-main ] || check_disk
  get_uv
  echo "building $folder: $3" >&2
  "$4" "$folder"
  printf '%s\n' "$wanted" >"$stamp"
}

new() {
  rm -rf "$1"
  "$UV" venv --quiet --python "$BASE" "$1"
}

add() {
  local folder=$1
  shift
  "$UV" pip install --quiet --python "$folder/bin/python" "$@" || fail "$folder is incomplete: see" \
    "above; a mirror is named by UV_DEFAULT_INDEX, a proxy by HTTPS_PROXY"
}

install_main() {
  new "$1"
  add "$1" --require-hashes -r "locks/$DEVICE.txt"
  add "$1" --no-deps --no-build-isolation -e ./client
  # Relative, so that Python reads it in a folder with umlauts and any locale, and after a move.
  for pth in "$1"/lib/python3*/site-packages/*chestct*.pth; do
    if [ -f "$pth" ]; then echo ../../../../client/src >"$pth"; fi
  done
}

install_test() {
  add "$1" --require-hashes -r locks/test.txt
}

install_triton() {
  new "$1"
  add "$1" --no-deps --require-hashes -r serving/requirements.txt
}

case $DEVICE in
  cpu | gpu) ;;
  *) fail "DEVICE is $DEVICE: expected cpu or gpu" ;;
esac
BASE=$(find_python)
lock
tell_dvc
for part in "$@"; do
  case $part in
    main)
      build .venv main "TensorFlow, MLflow, DVC and the rest for the $DEVICE, a minute" install_main \
        "locks/$DEVICE.txt" client/pyproject.toml
      ;;
    test)
      build .venv test "what the tests add, half a minute" install_test \
        "locks/$DEVICE.txt" client/pyproject.toml locks/test.txt
      ;;
    triton)
      build .venv-triton triton "the Triton server, seconds" install_triton serving/requirements.txt
      ;;
    *) fail "no environment is called $part: expected main, test or triton" ;;
  esac
done
