#!/usr/bin/env bash
# Smoke test of what the application host serves, through an SSH tunnel: a real inference by
# `chestct health`, then phantoms classified from files. Nothing but SSH must be open to Jenkins.
# shellcheck source=deploy/jenkins/common.sh
source "$(dirname "$0")/common.sh"
need DEPLOY_HOST SSH_USER SSH_KEY KNOWN_HOSTS

work=$(mktemp -d)
close() {
  ssh -S "$work/tunnel" -O exit "$DEPLOY_HOST" 2>/dev/null || true
  rm -rf "$work"
}
trap close EXIT

port=$(python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
# Comes back when the tunnel stands; its messages must not keep the step's pipes open.
connect -f -N -M -S "$work/tunnel" -o ExitOnForwardFailure=yes \
  -L "127.0.0.1:$port:127.0.0.1:${GRPC_PORT:-8001}" "$SSH_USER@$DEPLOY_HOST" \
  >/dev/null 2>"$work/ssh.log" ||
  die "no tunnel to the host: $(tr '\n' ' ' <"$work/ssh.log")"

export CHESTCT_URL=grpc://127.0.0.1:$port
chestct health --connect-timeout-s "${SMOKE_TIMEOUT_S:-60}"
python -m training phantom --config deploy/jenkins/phantom.yaml --output "$work/scans" >&2
chestct classify "$work/scans/test" --json --no-series --connect-timeout-s 10 | tee "$work/answers.jsonl"
wanted=$(find "$work/scans/test" -name '*.png' -o -name '*.dcm' | wc -l)
got=$(wc -l <"$work/answers.jsonl")
[ "$wanted" -gt 0 ] && [ "$got" -eq "$wanted" ] || die "$got of $wanted phantoms were answered"
say "$got phantoms classified"
