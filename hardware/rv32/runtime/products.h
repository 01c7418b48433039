/* What reads weights.bin: the layers' products with vectors. */

#ifndef PRODUCTS_H
#define PRODUCTS_H

#include "model.h"
#include "numbers.h"

static inline const float *floats(unsigned offset) { return (const float *)(weights + offset); }

#define ROWS 4 /* of a matrix that are multiplied together */

/* The sums of the rows that there are, four or fewer at a matrix's end, into y or added to it. */
INLINED void put_sums(const float *sum, int left, float *y, int add) {
    if (left >= ROWS && add)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) y[r] += sum[r];
    else if (left >= ROWS)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) y[r] = sum[r];
    else
        for (int r = 0; r < left; r++) y[r] = add ? y[r] + sum[r] : sum[r];
}

/* y = W x + bias, or y += W x + bias; W is what is stored, and the adapter's B diag(scales) A. */
void linear(const struct linear *l, const float *x, float *y, int add);

#if INPUT_BITS == 8 /* integers.c */
/* y = W x or y += W x, of codes of a grid, with x rounded to 8 bits. */
void integer_linear(const struct linear *l, const float *x, float *y, int add);

/* Round the state for the head; the sum of what it is then. */
float round_state(const float *x);

/* y = code x of so many rows of the head. */
void head_products(const byte *codes, int rows, float *y);
#endif

/* x = the token's row of the embedding. */
void embed(int token, float *x);

/* The first of the largest logits, without keeping them. */
int likeliest(const float *x);

#endif
