#!/usr/bin/env bash
# Runs a training command until it is done; a preempted slice is made anew and the run resumes. Usage: as run.sh
set -euo pipefail
: "${TPU:?name}" "${ZONE:?zone}"
here=$(dirname "$0")
until "$here/run.sh" "$@"; do
  state=$(gcloud compute tpus queued-resources describe "$TPU" --zone "$ZONE" --format 'value(state.state)' || true)
  if [ "$state" = ACTIVE ]; then
    echo "the run failed and the slice is alive: not a preemption" >&2
    exit 1
  fi
  "$here/delete.sh" || true
  "$here/create.sh"
done
