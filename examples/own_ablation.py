"""Which way of choosing zeros costs least here? python examples/own_ablation.py [MODEL] [TEXT]

All runs share one output folder: what two of them have in common is computed once.
"""

from __future__ import annotations

import sys

import edgepress


def main(model: str | None = None, text: str = "embedded") -> None:
    print(f"{'zeros':<10}{'method':<12}{'perplexity':>12}{'packed MiB':>12}{'seconds':>9}")
    for amount in ("1:8", "2:4"):
        for method in ("magnitude", "wanda", "sparsegpt"):
            result = edgepress.compress(
                model,
                data=text,
                depth=0,
                wanda=amount,
                prune=method,
                wanda_samples=8,
                tokens=2048,
                skip=["lora", "gptq", "eora"],
                out="example-ablation",
                progress=False,
            )
            last = result.last
            mib = last.packed_bytes / 2**20
            print(f"{amount:<10}{method:<12}{last.perplexity:>12.2f}{mib:>12.2f}{last.seconds:>9.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
