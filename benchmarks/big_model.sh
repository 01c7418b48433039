#!/usr/bin/env bash
# Llama-3.1-8B's shape (random weights, 15 GiB) through depth and wanda with the ordinary command, and the peak
# memory of the whole process as the kernel counted it. Needs 50 GiB of disk. Goal: under 8 GiB.
set -euo pipefail
home=$(mktemp -d "${1:-/tmp}/edgepress-8b-XXXX")
trap 'rm -rf "$home"' EXIT
.venv/bin/python -c "
from pathlib import Path
from benchmarks.shapes import write_random
write_random(Path('$home/llama-8b-shaped'), 'llama-3.1-8b')"
.venv/bin/python - "$home" <<'PY'
import resource, subprocess, sys
home = sys.argv[1]
command = f"""compress --model {home}/llama-8b-shaped --data embedded --depth 2 --wanda 2:4 --skip lora,gptq,eora
    --wanda-samples 16 --wanda-length 256 --depth-samples 4 --tokens 2048 -o {home}/out"""
done = subprocess.run([".venv/bin/" + command.split()[0], *command.split()[1:]])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
print(f"exit code {done.returncode}, peak resident size {peak:.2f} GiB, goal 8 GiB")
PY
