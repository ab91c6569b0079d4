#!/usr/bin/env bash
# Every benchmark that a GPU has a part in, on one GPU, in less than ten minutes: parity of the Triton kernels first, then
# neurons, training step, memory, inference and resident images beside their peers. Not yet run on a GPU.
#
#   benchmarks/gpu.sh FOLDER [CIFAR]
#
# FOLDER gets the JSON, the pictures and the logs; CIFAR is a folder with cifar-10-batches-py, without which resident
# images are left out. What fails or runs out of its time is told at the end, and leaves what it had; the rest is run.
set -u
out=${1:?usage: benchmarks/gpu.sh FOLDER [CIFAR]}
cifar=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
mkdir -p "$out"
failed=()

part() {  # name, seconds, command
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$seconds" "$python" "$here/$@" 2>&1 | tee "$out/$name.log" | tail -40
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
}

nvidia-smi > "$out/nvidia-smi.txt" 2>&1
part kernels_gpu_check 75 kernels_gpu_check.py
part neuron 90 neuron.py --T 4 32 --seconds 4 --out "$out"
part step 150 step.py --depth 18 34 50 --T 4 8 --batch 32 --seconds 5 --out "$out"
part step_compiled 110 step.py --dtype bf16 --batch 32 --compile --seconds 8 --out "$out/compiled"
part inference 80 inference.py --batch 1 32 --dtype bf16 --seconds 5 --out "$out"
part memory 40 memory.py --depth 18 --no-time --out "$out"
[ -z "$cifar" ] || part loader 30 loader.py --cifar "$cifar" --rounds 3 --out "$out"
if [ ${#failed[@]} -gt 0 ]; then
  echo "not complete: ${failed[*]}; see $out/*.log"
  exit 1
fi
