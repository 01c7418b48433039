"""Measure every stage, let the last one write, and export it: python examples/evaluate_and_export.py [MODEL]

What is exported is a C program for RISC-V cores; `make -C example-program check` compiles and runs it.
"""

from __future__ import annotations

import subprocess
import sys

import edgepress


def main(model: str | None = None) -> None:
    result = edgepress.compress(
        model,
        data="embedded",
        depth=1,
        wanda="none",
        quant="gptq4",
        quant_samples=16,
        tokens=4096,
        skip=["lora", "eora"],
        out="example-export",
        progress=False,
    )
    for stage in (result.source, *result.stages):
        score = edgepress.evaluate(stage, text="embedded", tokens=4096, progress=False).score("perplexity")
        print(f"{stage.name:<8} perplexity {score.value:8.2f}  (95 %: {score.low:.2f} to {score.high:.2f})")

    tokenizer, net = result.tokenizer(), result.model()
    ids = tokenizer("The", return_tensors="pt")["input_ids"]
    print(tokenizer.decode(net.generate(ids, max_new_tokens=12, do_sample=False)[0]))

    export = ["-m", "edgepress", "export", str(result.folder), "--context", "128", "-o", "example-program"]
    subprocess.run([sys.executable, *export], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
