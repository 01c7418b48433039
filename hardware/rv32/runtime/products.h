/* What reads weights.bin: the layers' products with vectors. */

#ifndef PRODUCTS_H
#define PRODUCTS_H

#include "model.h"
#include "numbers.h"

static inline const float *floats(unsigned offset) { return (const float *)(weights + offset); }

/* y = W x + bias, or y += W x + bias; W is what is stored, and the adapter's B diag(scales) A. */
void linear(const struct linear *l, const float *x, float *y, int add);

/* x = the token's row of the embedding. */
void embed(int token, float *x);

/* The first of the largest logits, without keeping them. */
int likeliest(const float *x);

#endif
