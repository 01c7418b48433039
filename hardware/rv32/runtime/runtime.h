/* The device layout of a model, and the one function that runs it. FORMAT.md beside the exporter describes weights.bin. */

#ifndef RUNTIME_H
#define RUNTIME_H

/* How the numbers of a matrix lie in weights.bin: one by one, or as codes of a grid. The grids of a model, from GRID on,
 * are in model.h. */
enum format { F32, F16, BF16, I8, U8, U4, GRID };

/* What lies between the layers of a feed-forward part. */
enum activation { ACT_SILU, ACT_GELU, ACT_GELU_PYTORCH_TANH, ACT_RELU, ACT_RELU2 };

/* The linear layers of a block in its table; the last is there only in a gated feed-forward part. */
enum layer { Q_LAYER, K_LAYER, V_LAYER, O_LAYER, UP_LAYER, DOWN_LAYER, GATE_LAYER };

/* A linear layer. Offsets count bytes from the start of weights.bin; 0 is none. */
struct linear {
    int rows, columns;
    unsigned format;
    int group; /* weights of a row that share a scale */
    unsigned codes, bias;
    int rank; /* of the adapter; 0 is none */
    unsigned adapter_format, a, b, rank_scales;
};

/* The embedding or the head: rows of numbers, for codes with a scale and a minimum each. */
struct matrix {
    unsigned format, codes, scales, minimum;
};

/* A function that `forward` calls, and whose instructions the simulator counts: it is not inlined or cloned. What else
 * `forward` is made of is inlined. */
#ifdef __clang__
#define OPERATOR __attribute__((noinline))
#else
#define OPERATOR __attribute__((noipa))
#endif
#define INLINED static inline __attribute__((always_inline, unused))

extern const unsigned char weights[];

/* Feed the token at a position. With want_next, returns the likeliest token after it, else 0. */
int forward(int token, int position, int want_next);

#endif
