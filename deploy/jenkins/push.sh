#!/usr/bin/env bash
# Pushes the images of this commit to ECR under the commit's tag, and writes their digests to
# results/deploy/release.env: what is deployed is named by digest, never by a tag that can move.
# shellcheck source=deploy/jenkins/common.sh
source "$(dirname "$0")/common.sh"
release_of_checkout
need AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
read_repository

# The registry's password lives in a folder of its own, only as long as this step.
DOCKER_CONFIG=$(mktemp -d)
export DOCKER_CONFIG
trap 'rm -rf "$DOCKER_CONFIG"' EXIT
aws ecr get-login-password |
  docker login --username AWS --password-stdin "${ECR_REPOSITORY%%/*}" >/dev/null

# Prints the digest of a tag; nothing if the registry does not have it.
digest_of() {
  local answer
  if answer=$(aws ecr describe-images --repository-name "$REPOSITORY_NAME" \
    --image-ids imageTag="$1" --query 'imageDetails[0].imageDigest' --output text 2>&1); then
    [[ $answer =~ ^sha256:[0-9a-f]{64}$ ]] || die "ECR gave '$answer' for $1, expected a digest"
    printf '%s' "$answer"
  elif [[ $answer != *ImageNotFoundException* ]]; then
    die "$answer"
  fi
}

lines=("CHESTCT_COMMIT=$COMMIT" "CHESTCT_PROFILE=$([ "$SERVER" = server ] && echo gpu || echo edge)")
for image in "$SERVER" client; do
  tag=$image-$COMMIT
  digest=$(digest_of "$tag")
  if [ -n "$digest" ]; then
    say "$tag is in the registry already; its tags do not move, so that one is deployed"
  else
    docker push "$ECR_REPOSITORY:$tag"
    digest=$(digest_of "$tag")
    [ -n "$digest" ] || die "$tag was pushed, but ECR does not know it"
  fi
  role=$([ "$image" = client ] && echo CLIENT || echo SERVER)
  lines+=("CHESTCT_${role}_IMAGE=$ECR_REPOSITORY@$digest")
  say "$image is $ECR_REPOSITORY@$digest"
done
mkdir -p "$(dirname "$RELEASE_FILE")"
printf '%s\n' "${lines[@]}" >"$RELEASE_FILE"
