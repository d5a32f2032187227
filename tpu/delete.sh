#!/usr/bin/env bash
# Gives the slice back.
set -euo pipefail
: "${TPU:?name}" "${ZONE:?zone}"
gcloud compute tpus queued-resources delete "$TPU" --zone "$ZONE" --force --quiet
