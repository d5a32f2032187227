#!/usr/bin/env bash
# Requests a spot slice and waits until it is active.
set -euo pipefail
: "${TPU:?name}" "${ZONE:?zone}" "${TYPE:?accelerator type, e.g. v5p-32}" "${RUNTIME:?runtime version}"
gcloud compute tpus queued-resources create "$TPU" --node-id "$TPU" --zone "$ZONE" \
  --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot
until gcloud compute tpus queued-resources describe "$TPU" --zone "$ZONE" --format 'value(state.state)' | grep -q ACTIVE; do
  date
  sleep 30
done
