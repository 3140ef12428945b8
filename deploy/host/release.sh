#!/usr/bin/env bash
# Releases on the application host. Each lies whole in releases/COMMIT: compose file, its files and
# release.env with the digests of its images; `current` and `previous` point to two of them.
#
#   receive FOLDER COMMIT   take in a release that was sent
#   activate COMMIT         pull its images and start them; ends well only if all are healthy
#   confirm COMMIT          it serves and was tested: make it current, delete older ones
#   restore                 start `current` again after a failed release; prints its commit, or none
#   previous                print the commit that a roll-back would start
#   status                  print what is current and previous, with their images
set -euo pipefail
ROOT=${CHESTCT_ROOT:-/opt/chestct}
WAIT_S=${CHESTCT_WAIT_S:-600} # a GPU builds its TensorRT plan at the first start

die() { echo "release: $*" >&2; exit 1; }

# commit_of current|previous: nothing if there is none.
commit_of() {
  [ ! -L "$ROOT/$1" ] || basename "$(readlink "$ROOT/$1")"
}

check() {
  [[ $1 =~ ^[0-9a-f]{40}$ ]] || die "'$1' is no commit"
  [ -f "$ROOT/releases/$1/release.env" ] || die "there is no release $1 on this host"
}

value() { # value COMMIT NAME: one line of its release.env
  sed -n "s/^$2=//p" "$ROOT/releases/$1/release.env"
}

compose() { # compose COMMIT ARGUMENT...
  local folder=$ROOT/releases/$1 files=()
  shift
  [ ! -f "$ROOT/secrets.env" ] || files=(--env-file "$ROOT/secrets.env")
  # Models belong to the host, not to a release.
  CHESTCT_MODELS=$ROOT/model_repository CHESTCT_RESULTS=$ROOT/results \
    docker compose --project-name chestct --project-directory "$folder" \
    --file "$folder/docker/compose.yaml" "${files[@]}" --env-file "$folder/release.env" \
    --profile "$(value "$(basename "$folder")" CHESTCT_PROFILE)" "$@"
}

# The host's own role may pull; no key is kept here, and the password of 12 hours is not either.
log_in() {
  local registry=${1%%/*}
  [[ $registry =~ \.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com$ ]] || return 0
  DOCKER_CONFIG=$(mktemp -d)
  export DOCKER_CONFIG
  trap 'rm -rf "$DOCKER_CONFIG"' EXIT
  # A configuration of its own hides plugins that were installed for this user.
  [ ! -d ~/.docker/cli-plugins ] || ln -s ~/.docker/cli-plugins "$DOCKER_CONFIG/"
  aws ecr get-login-password --region "${BASH_REMATCH[1]}" |
    docker login --username AWS --password-stdin "$registry" >/dev/null
}

start() {
  log_in "$(value "$1" CHESTCT_SERVER_IMAGE)"
  compose "$1" pull --quiet
  compose "$1" up --detach --wait --wait-timeout "$WAIT_S" --remove-orphans
}

point() { # point NAME COMMIT: in one step, so that a reader never finds neither
  ln -sfn "releases/$2" "$ROOT/$1.new"
  mv -T "$ROOT/$1.new" "$ROOT/$1"
}

receive() {
  local folder=$1 commit=$2 line
  [[ $commit =~ ^[0-9a-f]{40}$ ]] || die "'$commit' is no commit"
  for line in SERVER CLIENT; do
    grep -Eqx "CHESTCT_${line}_IMAGE=[^@[:space:]]+@sha256:[0-9a-f]{64}" "$folder/release.env" ||
      die "release.env names no ${line,,} image by its digest"
  done
  mkdir -p "$ROOT/releases"
  if [ -d "$ROOT/releases/$commit" ]; then
    cmp -s "$folder/release.env" "$ROOT/releases/$commit/release.env" ||
      die "release $commit is here with other images; a commit has one set of images"
    rm -rf "$folder"
  else
    chmod 755 "$folder"
    mv -T "$folder" "$ROOT/releases/$commit"
  fi
}

confirm() {
  local commit=$1 before kept folder image
  before=$(commit_of current)
  if [ "$before" != "$commit" ]; then
    [ -z "$before" ] || point previous "$before"
    point current "$commit"
  fi
  kept=" $commit $(commit_of previous) "
  for folder in "$ROOT"/releases/*; do
    [[ $kept != *" $(basename "$folder") "* ]] || continue
    while IFS='=' read -r _ image; do
      grep -qsF "$image" "$ROOT/current/release.env" "$ROOT/previous/release.env" ||
        docker image rm "$image" >/dev/null || echo "release: $image stays" >&2
    done < <(grep '^CHESTCT_.*_IMAGE=' "$folder/release.env")
    rm -rf "$folder"
  done
}

restore() {
  local commit
  commit=$(commit_of current)
  if [ -z "$commit" ]; then
    compose "$1" down >&2
    echo none
  else
    start "$commit" >&2
    echo "$commit"
  fi
}

status() {
  local name commit
  for name in current previous; do
    commit=$(commit_of "$name")
    echo "$name ${commit:-none}"
    [ -z "$commit" ] || sed -n 's/^CHESTCT_\(.*\)_IMAGE=/  \1 /p' "$ROOT/releases/$commit/release.env"
  done
}

mkdir -p "$ROOT"
exec 9>"$ROOT/lock"
flock -w 60 9 || die "another command has been at work on this host for a minute"
case ${1:-} in
  receive) receive "$2" "$3" ;;
  activate) check "$2"; start "$2" ;;
  confirm) check "$2"; confirm "$2" ;;
  # The release whose script this is: it is stopped where there is none to go back to.
  restore) restore "$(basename "$(cd "$(dirname "$0")/../.." && pwd)")" ;;
  previous) commit_of previous ;;
  status) status ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
