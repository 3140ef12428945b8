#!/usr/bin/env bash
# Classify a PNG, JPEG or DICOM file without the client: curl.sh FILE [http://HOST:8000]
set -euo pipefail
[ -f "${1:-}" ] || { echo "usage: $0 FILE [http://HOST:8000]" >&2; exit 2; }
printf '{"file": "%s"}' "$(base64 <"$1" | tr -d '\n')" |
  curl --fail-with-body -sS --data-binary @- "${2:-http://127.0.0.1:8000}/v2/models/chestct_encoded/generate"
