#!/usr/bin/env bash
# Copies the working tree to all hosts and runs a training command on them. Usage: run.sh CONFIG [options of train]
set -euo pipefail
: "${TPU:?name}" "${ZONE:?zone}"
cd "$(dirname "$0")/.."
git ls-files -z | tar --null -T - -czf /tmp/jaxmllm.tar.gz
gcloud compute tpus tpu-vm scp /tmp/jaxmllm.tar.gz "$TPU":jaxmllm.tar.gz --zone "$ZONE" --worker all
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all --command "
  mkdir -p jaxmllm && tar xzf jaxmllm.tar.gz -C jaxmllm && cd jaxmllm &&
  (test -d .venv || python3 -m venv .venv) && .venv/bin/pip install -q -e '.[tpu]' &&
  .venv/bin/jaxmllm train $(printf '%q ' "$@") --distributed"
