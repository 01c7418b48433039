/* What the C code that Deeploy writes for its target Generic calls, for this machine. Deeploy's wheel has no kernels;
 * these are written anew, with the arithmetic of its PULPOpen kernels, which tests/kernels.py states too. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BEGIN_SINGLE_CORE
#define END_SINGLE_CORE
#define SINGLE_CORE
#define deeploy_malloc malloc
#define deeploy_free(memory) ((void)(memory))

static int32_t clamped(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }

static void MatMul_s8_s8_s32(
    const int8_t *a, const int8_t *b, int32_t *c, uint32_t m, uint32_t n, uint32_t o, int32_t a_offset, int32_t b_offset,
    int32_t c_offset
) {
    for (uint32_t i = 0; i < m; i++)
        for (uint32_t k = 0; k < o; k++) {
            int32_t sum = c_offset;
            for (uint32_t j = 0; j < n; j++) sum += (a[i * n + j] + a_offset) * (b[j * o + k] + b_offset);
            c[i * o + k] = sum;
        }
}

/* Factors and addends of each channel, the last dimension. */
#define REQUANT(name, type)                                                                                            \
    static void name(                                                                                                  \
        const type *x, uint32_t size, const int32_t *mul, const int32_t *add, int8_t *y, uint32_t shift,               \
        uint32_t channels, int32_t in_offset, int32_t out_offset, int32_t low, int32_t high, int half                  \
    ) {                                                                                                                \
        for (uint32_t i = 0; i < size; i++) {                                                                          \
            int32_t wide = (x[i] + in_offset) * mul[i % channels] + add[i % channels] + (half ? 1 << (shift - 1) : 0); \
            y[i] = (int8_t)clamped((wide >> shift) + out_offset, low, high);                                           \
        }                                                                                                              \
    }
REQUANT(RequantShift_s32_s8_NHWC, int32_t)
REQUANT(RequantShift_s16_s8_NHWC, int16_t)

static void iRMSnorm_s8_s8(
    const int8_t *x, int8_t *y, const int32_t *weight, int32_t offset, uint32_t size, uint32_t width, uint32_t shift
) {
    for (; size; size -= width, x += width, y += width) {
        int32_t sum = 0, root = 0;
        for (uint32_t i = 0; i < width; i++) sum += (x[i] + offset) * (x[i] + offset);
        sum = sum / (int32_t)width + 1;
        while ((root + 1) * (root + 1) <= sum) root++;
        for (uint32_t i = 0; i < width; i++)
            y[i] = (int8_t)clamped((x[i] + offset) * weight[i] / root >> shift, -128, 127);
    }
}

/* The shares of 0 to 255 are kept less half of that. */
static void Softmax_s8_s8(
    const int8_t *x, int8_t *y, uint32_t size, uint32_t width, int32_t a, int32_t b, int64_t c, int32_t log2,
    uint32_t levels
) {
    uint32_t power[1024];
    (void)a;
    for (; size; size -= width, x += width, y += width) {
        int32_t most = x[0];
        uint32_t sum = 0;
        for (uint32_t i = 0; i < width; i++) most = x[i] > most ? x[i] : most;
        for (uint32_t i = 0; i < width; i++) {
            int32_t below = x[i] - most, z = clamped(-(below / log2), 0, 31), p = below + z * log2 + b;
            sum += power[i] = (uint32_t)((p * p + c) >> z);
        }
        for (uint32_t i = 0; i < width; i++) y[i] = (int8_t)(power[i] * (levels - 1) / sum - levels / 2);
    }
}

static void iHardswish_s8_s32(
    const int8_t *x, int32_t *y, uint32_t size, int32_t sixth, int32_t three, int32_t six, int32_t offset
) {
    for (uint32_t i = 0; i < size; i++) {
        int32_t own = x[i] + offset;
        y[i] = own * clamped(own + three, 0, six) * sixth;
    }
}
