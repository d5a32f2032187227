#!/usr/bin/env bash
# Deletes the slice.
set -euo pipefail
: "${TPU:?name}" "${ZONE:?zone}"
gcloud compute tpus queued-resources delete "$TPU" --zone "$ZONE" --force --quiet
