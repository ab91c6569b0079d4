#!/usr/bin/env bash
# Every benchmark that a GPU has a part in, on one GPU, in less than ten minutes: parity of the Triton kernels first, then
# neurons, training step, memory and inference beside their peers. Not yet run on a GPU.
#
#   benchmarks/gpu.sh FOLDER
#
# FOLDER gets the JSON, the pictures and the logs. What fails or runs out of its time is told at the end; the rest is run.
set -u
out=${1:?usage: benchmarks/gpu.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
mkdir -p "$out"
failed=()

part() {  # name, seconds, command
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$seconds" "$python" "$here/$@" 2>&1 | tee "$out/$name.log" | tail -40
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
}

nvidia-smi > "$out/nvidia-smi.txt" 2>&1
part kernels_gpu_check 100 kernels_gpu_check.py
part neuron 100 neuron.py --seconds 8 --out "$out"
part memory 70 memory.py --out "$out"
part step 170 step.py --depth 18 --batch 32 --seconds 20 --compile --out "$out"
part inference 140 inference.py --batch 1 32 --seconds 8 --out "$out"
if [ ${#failed[@]} -gt 0 ]; then
  echo "not complete: ${failed[*]}; see $out/*.log"
  exit 1
fi
