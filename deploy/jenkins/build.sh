#!/usr/bin/env bash
# Builds the images of this commit: the server (SERVER=edge or server) and the client.
# shellcheck source=deploy/jenkins/common.sh
source "$(dirname "$0")/common.sh"
release_of_checkout
need ECR_REPOSITORY

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
for image in "$SERVER" client; do
  say "building $image of ${COMMIT:0:12}"
  docker build --file "docker/$image.Dockerfile" \
    --build-arg VERSION="$version" --build-arg COMMIT="$COMMIT" \
    --tag "$ECR_REPOSITORY:$image-$COMMIT" .
done
