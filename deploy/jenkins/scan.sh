#!/usr/bin/env bash
# Looks for known vulnerabilities: pip-audit in the hashed locks, those inside the images too, and
# trivy in the images where it is installed; with --locks only the former. A finding ends the build;
# deploy/jenkins/accepted.txt lists the ones that may stay.
# shellcheck source=deploy/jenkins/common.sh
source "$(dirname "$0")/common.sh"
images=()
if [ "${1:-}" != --locks ]; then
  release_of_checkout
  need ECR_REPOSITORY
  images=("$SERVER" client)
fi

accepted=$(sed -E 's/[[:space:]]*#.*//; /^$/d' deploy/jenkins/accepted.txt)
ignored=()
for name in $accepted; do ignored+=(--ignore-vuln "$name"); done

failed=()
for lock in locks/*.txt docker/*.txt serving/requirements.txt; do
  say "auditing $lock"
  # Strict: a package that could not be looked up is a failure, not a package without findings.
  pip-audit --strict --require-hashes --disable-pip --progress-spinner off \
    "${ignored[@]}" --requirement "$lock" || failed+=("$lock")
done

if [ ${#images[@]} -eq 0 ]; then
  :
elif command -v trivy >/dev/null; then
  printf '%s\n' "$accepted" >"${TMPDIR:-/tmp}/trivyignore.$$"
  trap 'rm -f "${TMPDIR:-/tmp}/trivyignore.$$"' EXIT
  for image in "${images[@]}"; do
    say "scanning $image"
    trivy image --quiet --exit-code 1 --severity HIGH,CRITICAL --ignore-unfixed \
      --ignorefile "${TMPDIR:-/tmp}/trivyignore.$$" "$ECR_REPOSITORY:$image-$COMMIT" ||
      failed+=("$image")
  done
else
  say "NOT SCANNED: the images; trivy is not installed here. ECR scans them after the push."
fi

[ ${#failed[@]} -eq 0 ] ||
  die "vulnerabilities in ${failed[*]}: update them (make locks), or accept them with a reason" \
    "in deploy/jenkins/accepted.txt"
