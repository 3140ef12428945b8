#!/usr/bin/env bash
# Starts the Jenkins job JOB at URL as USER by an API token (which needs no crumb), waits until it has
# left the queue, and prints its address. The token goes to curl on a pipe: neither the
# list of processes nor the log shows it.
set -euo pipefail
for name in URL USER TOKEN JOB; do
  [ -n "${!name:-}" ] || { echo "trigger: the secret $name is not set" >&2; exit 1; }
done
[[ $URL =~ ^https://[^@[:space:]\"\\]+$ || $URL =~ ^http://(127\.0\.0\.1|localhost)(:[0-9]+)?/?$ ]] ||
  { echo "trigger: URL must be https://...: the token would travel in clear" >&2; exit 1; }
[[ $USER$TOKEN != *[[:cntrl:]\"\\:]* ]] ||
  { echo "trigger: USER or TOKEN holds a character that no Jenkins gives" >&2; exit 1; }
[[ $JOB =~ ^[A-Za-z0-9._/-]+$ ]] ||
  { echo "trigger: JOB must be the job's name, folders by /" >&2; exit 1; }

# No proxy stands between this machine and itself.
direct=()
[[ ! $URL =~ ^https?://(127\.[0-9.]+|localhost|\[::1\])(:|/|$) ]] || direct=(--noproxy '*')

ask() {
  curl --config <(printf 'user = "%s:%s"\n' "$USER" "$TOKEN") --silent --show-error --fail \
    --max-time 30 --proto '=http,https' "${direct[@]}" "$@"
}

path=job/${JOB//\//\/job\/}
headers=$(ask --request POST --dump-header - --output /dev/null \
  "${URL%/}/$path/buildWithParameters?delay=0sec")
item=$(sed -n 's/^[Ll]ocation: *\(.*\/queue\/item\/[0-9]*\)\/\{0,1\}\r*$/\1/p' <<<"$headers")
[ -n "$item" ] || { echo "trigger: Jenkins named no place in its queue" >&2; exit 1; }
# Jenkins names itself as it is configured; the answer is asked for where we reached it.
item=${URL%/}/queue/item/${item##*/}

for _ in $(seq "${QUEUE_POLLS:-60}"); do
  answer=$(ask "$item/api/json")
  if build=$(grep -o '"executable":{[^}]*' <<<"$answer"); then
    echo "trigger: started $(grep -o '"number":[0-9]*' <<<"$build" | tr -dc 0-9)"
    exit 0
  elif grep -q '"cancelled":true' <<<"$answer"; then
    echo "trigger: the job was taken out of the queue" >&2
    exit 1
  fi
  sleep "${QUEUE_POLL_S:-5}"
done
# Another build is at work: builds do not run side by side, and this one follows it.
echo "trigger: queued behind another build"
