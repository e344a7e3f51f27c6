#!/usr/bin/env bash
# What only a GPU can show, in one command: the tests marked `gpu`, then benchmarks/gpu_check.py.
#
#   scripts/gpu_check.sh [FOLDER]                       # JSON and log into benchmarks/results
#   PYTHON=python3 scripts/gpu_check.sh /tmp/out        # with another interpreter
#   SCALE=toy DEVICE=cpu scripts/gpu_check.sh /tmp/out  # a rehearsal without a GPU
#
# Under 8 minutes on one H100, no network. The interpreter needs the package itself
# (`pip install --no-deps .` is enough beside its dependencies) and, for the tests, pytest and
# hypothesis: without them the tests are left out, which the log says. Settings of the GPU are read
# by nobody and changed by nobody.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${1:-benchmarks/results}
python=${PYTHON:-.venv/bin/python}
name=$out/$(date -u +%Y-%m-%d)-gpu
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
mkdir -p "$out"

run_tests() {
  if ! "$python" -c 'import hypothesis, moto, psutil, pytest'; then
    echo "tests left out: hypothesis, moto, psutil or pytest is not installed"
    return 0
  fi
  mapfile -t files < <(grep -rl 'pytest\.mark\.gpu' tests)
  timeout 150 "$python" -m pytest -q -m gpu -p no:cacheprovider "${files[@]}"
}

check() {
  run_tests
  local tests=$?
  timeout 320 "$python" benchmarks/gpu_check.py "$name.json" \
    --device "${DEVICE:-cuda}" --scale "${SCALE:-full}" || return 1
  return $tests
}

check 2>&1 | tee "$name.log"
