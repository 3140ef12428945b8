# shellcheck shell=bash
# What the steps of the Jenkinsfile share; sourced by them.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$ROOT"
export PATH=$ROOT/.venv/bin:$PATH

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; }
die() { say "$*"; exit 1; }

# need NAME...: each of these variables must be set and not empty.
need() {
  local name
  for name; do
    [ -n "${!name:-}" ] || die "the variable $name is not set; the Jenkinsfile sets it"
  done
}

# The commit that is built, and the names of its images: edge-COMMIT or server-COMMIT, client-COMMIT.
release_of_checkout() {
  COMMIT=${COMMIT:-$(git rev-parse HEAD)}
  [[ $COMMIT =~ ^[0-9a-f]{40}$ ]] || die "COMMIT is '$COMMIT', expected 40 hexadecimal digits"
  SERVER=${SERVER:-edge}
  [[ $SERVER =~ ^(edge|server)$ ]] || die "SERVER is '$SERVER', expected edge (CPU) or server (GPU)"
  RELEASE_FILE=${RELEASE_FILE:-results/deploy/release.env}
}

# ECR_REPOSITORY is the address that AWS shows: ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME.
read_repository() {
  need ECR_REPOSITORY AWS_ACCOUNT_ID
  local form='^([0-9]{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com/([a-z0-9._/-]+)$'
  [[ $ECR_REPOSITORY =~ $form ]] ||
    die "ECR_REPOSITORY is no ECR address, expected ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME"
  [ "${BASH_REMATCH[1]}" = "$AWS_ACCOUNT_ID" ] ||
    die "ECR_REPOSITORY is not of the account AWS_ACCOUNT_ID: push only to your own registry"
  AWS_DEFAULT_REGION=${BASH_REMATCH[2]}
  # shellcheck disable=SC2034 # push.sh reads it
  REPOSITORY_NAME=${BASH_REMATCH[3]}
  export AWS_DEFAULT_REGION
}

# The one way to the application host. The host's key must be in KNOWN_HOSTS; an unknown or a
# changed one ends the step. DEPLOY_HOST, SSH_USER and SSH_KEY come from Jenkins' credentials.
connect() {
  ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o UpdateHostKeys=no -o IdentitiesOnly=yes \
    -o UserKnownHostsFile="$KNOWN_HOSTS" -o GlobalKnownHostsFile=/dev/null -o ConnectTimeout=15 \
    -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -i "$SSH_KEY" -p "${SSH_PORT:-22}" "$@"
}
on_host() { connect "$SSH_USER@$DEPLOY_HOST" "$@"; }
