#!/usr/bin/env bash
# All that needs a GPU, in less than eight minutes on a bare machine that has torch, transformers,
# triton, peft, numpy, safetensors and pytest: compiled kernels against their definitions,
# compute-sanitizer on the small cases, each kernel's rate beside the rate of a large copy, and the
# engine on the shape of Llama-3.1-8B with random weights, its decode steps replayed and launched.
#
#   benchmarks/gpu.sh [FOLDER]     one results file, FOLDER/gpu.json, and the logs beside it
#
# msgspec must be there too, and llguidance if grammars shall be; wheels in .whl are used from there.
set -uo pipefail
cd "$(dirname "$0")/.."

folder=${1:-${OUT:-benchmarks/results}}
mkdir -p "$folder"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 TRITON_INTERPRET=0 TRITON_CACHE_DIR="$scratch/triton"
if compgen -G ".whl/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" .whl/*.whl
  export PYTHONPATH="$PYTHONPATH:$scratch/site"
fi

# name, seconds, command: its output goes to a log, its end to here, its status into the results.
part() {
  local name=$1 limit_s=$2 status=0 began_s=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit_s" "$@" >"$folder/$name.log" 2>&1 || status=$?
  tail -n "${TAIL:-12}" "$folder/$name.log"
  echo "== $name: status $status after $((SECONDS - began_s)) s"
  echo "$name $status $((SECONDS - began_s))" >>"$scratch/parts"
}

# The repository's own settings ask for plugins that a bare machine has not.
tests=(python3 -m pytest -c /dev/null --rootdir "$PWD" --noconftest --import-mode=importlib
  -p no:cacheprovider -q tests/gpu)

# Most of the time goes into compiling, which processes can do side by side.
workers=()
if python3 -c 'import xdist' 2>/dev/null; then workers=(-n 12); fi

part compiled 120 "${tests[@]}" "${workers[@]}" --maxfail 10 --junitxml "$scratch/compiled.xml"
if command -v compute-sanitizer >/dev/null; then
  # Without torch's own pool every tensor has bounds that can be overstepped.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 50 \
    compute-sanitizer --tool memcheck --error-exitcode 9 "${tests[@]}" -k "small and bfloat16"
  part racecheck 35 \
    compute-sanitizer --tool racecheck --error-exitcode 9 "${tests[@]}" -k "small and bfloat16"
fi
TAIL=100 part kernels 50 python3 -m benchmarks.kernels --output "$scratch/kernels.json"
part engine 220 python3 -m benchmarks.engine --shape llama-3.1-8b --device cuda --dtype bfloat16 \
  --parts decode recorded --batch 64 --prompt-tokens 480 --answer-tokens 24 --most-adapters 32 \
  --max-model-len 1024 --rounds 2 --checks 1 --output "$scratch/engine.json"

python3 - "$scratch" "$folder/gpu.json" <<'PYTHON'
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

scratch, output = map(Path, sys.argv[1:])
report = {"command": "benchmarks/gpu.sh", "parts": {}}
for line in (scratch / "parts").read_text().splitlines():
    name, status, seconds = line.split()
    report["parts"][name] = {"status": int(status), "seconds": int(seconds)}
if (scratch / "compiled.xml").exists():
    suite = ElementTree.parse(scratch / "compiled.xml").getroot().find("testsuite")
    report["compiled"] = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
for name in ("kernels", "engine"):
    path = scratch / f"{name}.json"
    report[name] = json.loads(path.read_text()) if path.exists() else None
output.write_text(json.dumps(report, indent=1) + "\n")
print("written:", output)
PYTHON
! grep -qv '^[a-z]* 0 ' "$scratch/parts"
