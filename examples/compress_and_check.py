"""Compress a model and ask two chips about it: python examples/compress_and_check.py [MODEL] [TEXT]

MODEL is a folder, hub id, .gguf or llama2.c file; without one it is the packaged SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import sys

import edgepress


def main(model: str | None = None, text: str = "embedded") -> None:
    result = edgepress.compress(
        model,
        data=text,
        depth=1,
        wanda="2:4",
        quant="gptq4",
        wanda_samples=16,
        quant_samples=16,
        tokens=4096,
        skip=["lora", "eora"],
        out="example-compress",
    )
    print(result)
    for chip in ("siracusa", "esp32-s3"):
        verdict = edgepress.check(result, soc=chip)
        print(f"{chip}: {'fits' if verdict.fits else 'does not fit'}. {verdict.summary}")
    print(f"{result.folder} loads with transformers; from Python: result.model()")


if __name__ == "__main__":
    main(*sys.argv[1:3])
