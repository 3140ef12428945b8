#!/usr/bin/env bash
# Deploys the images in results/deploy/release.env to the application host, tests them there, and
# puts the release before back if any step fails or the job is stopped.
#
#   deploy.sh               this commit
#   deploy.sh --roll-back   the release that served before the present one
#
# Exit codes: 0 serving; 1 failed, the release before serves again (or none was there);
# 3 failed, and so did the roll-back: somebody must look at the host.
# shellcheck source=deploy/jenkins/common.sh
source "$(dirname "$0")/common.sh"
need DEPLOY_HOST SSH_USER SSH_KEY KNOWN_HOSTS
# Quoted twice: it is the host's shell that expands it.
HOST_ROOT="\${CHESTCT_ROOT:-/opt/chestct}"

# A command of deploy/host/release.sh on the host, in the version of release $1.
release() {
  local commit=$1
  shift
  on_host "bash $HOST_ROOT/releases/$commit/deploy/host/release.sh $*"
}

send() {
  local stage
  stage=$(mktemp -d)
  # The files of the commit, not of the working tree.
  git archive "$COMMIT" -- docker deploy | tar --extract --directory "$stage"
  cp "$RELEASE_FILE" "$stage/release.env"
  tar --create --directory "$stage" . | on_host "set -e
    incoming=\$(mktemp -d $HOST_ROOT/incoming.XXXXXX)
    tar --extract --no-same-owner --directory \"\$incoming\"
    bash \"\$incoming/deploy/host/release.sh\" receive \"\$incoming\" $COMMIT"
  rm -rf "$stage"
}

touched=no
finish() {
  local status=$?
  trap - EXIT
  trap '' INT TERM # nothing may stop a roll-back half way
  if [ "$status" -ne 0 ] && [ "$touched" = yes ]; then
    say "FAILED with exit code $status; rolling back"
    local serving
    if ! serving=$(release "$COMMIT" restore); then
      say "THE ROLL-BACK FAILED: look at the host"
      exit 3
    elif [ "$serving" = none ]; then
      say "there was no release before; the service is stopped"
    elif "$ROOT/deploy/jenkins/smoke.sh" >&2; then
      say "rolled back: $serving serves again"
    else
      say "THE ROLL-BACK FAILED: $serving was started again and does not answer"
      exit 3
    fi
    exit 1
  fi
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ "${1:-}" = --roll-back ]; then
  COMMIT=$(on_host "bash $HOST_ROOT/current/deploy/host/release.sh previous")
  [[ $COMMIT =~ ^[0-9a-f]{40}$ ]] || die "the host keeps no release before the present one"
else
  release_of_checkout
  [ -f "$RELEASE_FILE" ] || die "$RELEASE_FILE is missing; push.sh writes it"
  grep -qx "CHESTCT_COMMIT=$COMMIT" "$RELEASE_FILE" || die "$RELEASE_FILE is of another commit"
  send
fi
touched=yes
release "$COMMIT" activate "$COMMIT" >&2
"$ROOT/deploy/jenkins/smoke.sh"
release "$COMMIT" confirm "$COMMIT" >&2
touched=no
say "$COMMIT serves"
