"""The C kernels behind Deeploy's integer operators in plain Python, one number after the other, for tests.

After pulp-platform/Deeploy: TargetLibraries/PULPOpen/src/{UniformRequantShift,iRMSnorm,Softmax}.c and
TargetLibraries/Generic/src/Hardswish_s8.c. C divides towards zero, and >> of a negative number rounds down.
"""

from __future__ import annotations


def c_division(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def clamp(x: int, low: int = -128, high: int = 127) -> int:
    return min(max(x, low), high)


def c_requant(x: int, mul: int, add: int, shift: int) -> int:
    wide = x * mul + add + (1 << (shift - 1))
    assert -(2**31) <= wide < 2**31
    return clamp(wide >> shift)


def c_rms_norm(row: list[int], weight: list[int], shift: int) -> list[int]:
    mean = c_division(sum(x * x for x in row), len(row)) + 1
    root = max(r for r in range(256) if r * r <= mean)
    return [clamp(c_division(x * w, root) >> shift) for x, w in zip(row, weight, strict=True)]


def c_softmax(row: list[int], log2: int, b: int, c: int) -> list[int]:
    powers = []
    for x in row:
        below = x - max(row)
        z = clamp(-c_division(below, log2), 0, 31)
        p = below + z * log2
        powers.append(((p + b) * (p + b) + c) >> z)
    return [power * 255 // sum(powers) for power in powers]


def c_hardswish(x: int, one_over_six: int, three: int, six: int) -> int:
    return x * clamp(x + three, 0, six) * one_over_six
