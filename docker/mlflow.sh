#!/bin/bash
# MLflow's server with a user and a password; runs, artefacts and users lie in /var/lib/mlflow.
set -euo pipefail
: "${MLFLOW_TRACKING_USERNAME:?}" "${MLFLOW_TRACKING_PASSWORD:?}" "${MLFLOW_FLASK_SERVER_SECRET_KEY:?}"
store=${MLFLOW_STORE:-/var/lib/mlflow}
umask 077
settings=$(mktemp)
# A percent sign would be read as a reference.
cat >"$settings" <<INI
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///$store/auth.db
admin_username = ${MLFLOW_TRACKING_USERNAME//%/%%}
admin_password = ${MLFLOW_TRACKING_PASSWORD//%/%%}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
export MLFLOW_AUTH_CONFIG_PATH=$settings MLFLOW_DISABLE_TELEMETRY=true
unset MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD
exec python3 -m mlflow server --app-name basic-auth --workers 1 \
  --host "${MLFLOW_HOST:-0.0.0.0}" --port "${MLFLOW_PORT:-5000}" \
  --allowed-hosts "${MLFLOW_ALLOWED_HOSTS:-mlflow:5000,localhost:*,127.0.0.1:*}" \
  --backend-store-uri "sqlite:///$store/mlflow.db" --artifacts-destination "$store/artifacts"
