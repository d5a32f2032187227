#!/usr/bin/env bash
# Runs a training command until it is done. After a preemption it creates a new slice and resumes. Usage: as run.sh
set -euo pipefail
: "${TPU:?name}" "${ZONE:?zone}"
here=$(dirname "$0")
until "$here/run.sh" "$@"; do
  state=$(gcloud compute tpus queued-resources describe "$TPU" --zone "$ZONE" --format 'value(state.state)' || true)
  if [ "$state" = ACTIVE ]; then
    echo "the run failed while the slice is active, so it was not preempted" >&2
    exit 1
  fi
  "$here/delete.sh" || true
  "$here/create.sh"
done
