/* Numbers as they are stored, and the functions of them that a libc would have. */

#ifndef NUMBERS_H
#define NUMBERS_H

typedef unsigned int word;
typedef unsigned short half;
typedef unsigned char byte;

static inline float from_bits(word bits) {
    union {
        word bits;
        float value;
    } u = {bits};
    return u.value;
}

static inline word to_bits(float value) {
    union {
        float value;
        word bits;
    } u = {value};
    return u.bits;
}

static inline float from_half(half h) {
    /* The sign is spread upwards by widening and cut to one bit. The exponent's bias differs by 112: multiplying by
     * 2^112 is right for subnormal halves too. */
    return from_bits((word)(short)h << 13 & 0x8fffffff) * 0x1p112f;
}

static inline float from_brain(word h) { return from_bits(h << 16); }

/* a b + c, rounded once: one instruction of RV32F. Compilers are told to join no others, so that the program has the
 * same numbers, to the last bit, on every machine it is compiled for. */
static inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

/* half: 0.5 with the sign of x */
/* The larger; of a number and what is none the number. One instruction too, which gcc must be told. */
static inline float larger(float a, float b) {
#ifdef __riscv
    float most;
    __asm__("fmax.s %0, %1, %2" : "=f"(most) : "f"(a), "f"(b));
    return most;
#else
    return __builtin_fmaxf(a, b);
#endif
}

#define LARGEST 0x1.fffffep127f

static inline float exponential_within(float x, float half) {
    int n = (int)fused(x, 1.44269504f, half);
    /* ln 2 in two parts, so that the difference keeps its digits; then Taylor's series for |r| <= ln 2 / 2. */
    float r = fused((float)n, 2.12194440e-4f, fused((float)n, -0.693359375f, x));
    float p = 1.0f / 5040;
    p = fused(p, r, 1.0f / 720);
    p = fused(p, r, 1.0f / 120);
    p = fused(p, r, 1.0f / 24);
    p = fused(p, r, 1.0f / 6);
    p = fused(p, r, 0.5f);
    p = fused(p, r, 1.0f);
    p = fused(p, r, 1.0f);
    return p * from_bits((word)(n + 127) << 23);
}

/* Kept within 1e-38 and 1e38. */
static inline float exponential(float x) {
    x = -larger(-larger(x, -87.0f), -88.0f);
    return exponential_within(x, __builtin_copysignf(0.5f, x));
}

/* Of x <= 0; what is below 1e-38 becomes that. */
static inline float decay(float x) { return exponential_within(larger(x, -87.0f), -0.5f); }

/* Of an angle from 0 to 12,000: less a multiple of pi / 2 in three parts, then Taylor's series for |r| <= pi / 4. */
static inline void turn(float angle, float *cosine, float *sine) {
    int quarter = (int)fused(angle, 0.636619772f, 0.5f);
    float k = (float)quarter;
    float r = fused(k, -7.549789954891882e-8f, fused(k, -4.837512969970703e-4f, fused(k, -1.5703125f, angle)));
    float rr = r * r, s = 1.0f / 362880, c = -1.0f / 3628800;
    s = fused(s, rr, -1.0f / 5040);
    s = fused(s, rr, 1.0f / 120);
    s = fused(s, rr, -1.0f / 6);
    s = fused(s, rr, 1.0f);
    s *= r;
    c = fused(c, rr, 1.0f / 40320);
    c = fused(c, rr, -1.0f / 720);
    c = fused(c, rr, 1.0f / 24);
    c = fused(c, rr, -0.5f);
    c = fused(c, rr, 1.0f);
    float swap = quarter & 1 ? s : c, other = quarter & 1 ? c : s;
    *cosine = (quarter + 1) & 2 ? -swap : swap;
    *sine = quarter & 2 ? -other : other;
}

#endif
