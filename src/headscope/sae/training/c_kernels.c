// Loops over pairs, rows and latents that torch makes in several passes; `c_kernels.py` compiles and calls them.
//
// Matrices are row by row, without gaps but for a stated stride. What a function writes does not depend on `threads`:
// each element is computed by one thread, in one order.

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { WORD = 64 };  // bits

// largest[i] = max over k of |vectors[i][k]|; NaN where there is one
void largest_of_rows(const float *vectors, int64_t n, int64_t d, float *largest, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float *v = vectors + i * d;
        float most = 0;
        int numbers = 1;
#pragma omp simd reduction(max : most) reduction(& : numbers)
        for (int64_t k = 0; k < d; k++) {
            float size = fabsf(v[k]);
            most = size > most ? size : most;
            numbers &= size >= 0;
        }
        largest[i] = numbers ? most : NAN;
    }
}

// rounded[i][k] = round(vectors[i][k] / scale[i]), to even; lost[i] and size[i] = norms of what that took, and of it
void round_rows(const float *vectors, const float *scale, int64_t n, int64_t d, int8_t *rounded, int64_t stride,
                float *lost, float *size, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float *v = vectors + i * d, unit = scale[i];
        int8_t *to = rounded + i * stride;
        float taken = 0, kept = 0;
#pragma omp simd reduction(+ : taken, kept)
        for (int64_t k = 0; k < d; k++) {
            float x = v[k] / unit, digit = rintf(x);
            to[k] = (int8_t)(int32_t)digit;
            taken += (x - digit) * (x - digit);
            kept += digit * digit;
        }
        lost[i] = sqrtf(taken);
        size[i] = sqrtf(kept);
    }
}

// bit i of words from bits[latent[p]][first] on: raised[p][i] * scale[p] > limit[i]; their number is added to counts
void mark_above(const int32_t *raised, const int64_t *latent, const float *scale, const float *limit, int64_t n,
                int64_t width, uint64_t *bits, int64_t words, int64_t first, int64_t *counts, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < n; p++) {
        uint64_t *to = bits + latent[p] * words + first;
        int64_t count = 0;
        for (int64_t start = 0; start < width; start += WORD) {
            const int32_t *r = raised + p * width + start;
            const float *l = limit + start;
            int64_t end = width - start < WORD ? width - start : WORD;
            int any = 0;
            uint64_t word = 0;
#pragma omp simd reduction(| : any)
            for (int64_t i = 0; i < end; i++)
                any |= r[i] * scale[p] > l[i];
            if (any)  // rarely
                for (int64_t i = 0; i < end; i++)
                    word |= (uint64_t)(r[i] * scale[p] > l[i]) << i;
            to[start / WORD] = word;
            count += __builtin_popcountll(word);
        }
        counts[latent[p]] += count;
    }
}

// (latent, row) of all bits that are set, by latent, then by row; starts[j] is where latent j begins
void marked(const uint64_t *bits, const int64_t *starts, int64_t n, int64_t words, int64_t *latent, int64_t *row,
            int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < n; j++) {
        int64_t at = starts[j];
        for (int64_t w = 0; w < words; w++)
            for (uint64_t word = bits[j * words + w]; word; word &= word - 1) {
                latent[at] = j;
                row[at++] = WORD * w + __builtin_ctzll(word);
            }
    }
}

// out[p] = of_latents[latent[p]] . of_rows[row[p]]
void products(const int64_t *latent, const int64_t *row, int64_t n, const float *of_latents, const float *of_rows,
              int64_t d, float *out, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < n; p++) {
        const float *a = of_latents + latent[p] * d, *b = of_rows + row[p] * d;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < d; k++)
            sum += a[k] * b[k];
        out[p] = sum;
    }
}

// out[i] = sum over p from starts[i] to starts[i + 1] of weights[p] vectors[index[p]], in this order
void weighted_sums(const int64_t *index, const int64_t *starts, const float *weights, const float *vectors, int64_t n,
                   int64_t d, float *out, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t i = 0; i < n; i++) {
        float *to = out + i * d;
        memset(to, 0, d * sizeof(float));
        for (int64_t p = starts[i]; p < starts[i + 1]; p++) {
            const float *v = vectors + index[p] * d, weight = weights[p];
#pragma omp simd
            for (int64_t k = 0; k < d; k++)
                to[k] += weight * v[k];
        }
    }
}

// takes from each row of `gradient` its part along the same row of `unit_vectors`
void take_parallel(float *gradient, const float *unit_vectors, int64_t n, int64_t d, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float *g = gradient + i * d, along = 0;
        const float *v = unit_vectors + i * d;
#pragma omp simd reduction(+ : along)
        for (int64_t k = 0; k < d; k++)
            along += g[k] * v[k];
#pragma omp simd
        for (int64_t k = 0; k < d; k++)
            g[k] -= along * v[k];
    }
}
