// Loops over pairs, rows and latents that torch makes in several passes; `c_kernels.py` compiles and calls them.
//
// Matrices are row by row, without gaps but for a stated stride. What a function writes does not depend on `threads`:
// each element is computed by one thread, in one order.

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AMX_INT8__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { WORD = 64, SOME = 16, HALVINGS = 14 };  // bits; rows at a time; of an interval

// bit i: products[i] * scale > limit[i]
static inline uint64_t above(const int32_t *products, float scale, const float *limit, int64_t n)
{
    int any = 0;
    uint64_t word = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = 0; i < n; i++)
        any |= products[i] * scale > limit[i];
    if (any)  // rarely
        for (int64_t i = 0; i < n; i++)
            word |= (uint64_t)(products[i] * scale > limit[i]) << i;
    return word;
}

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

// bit i of words from bits[latent[p]][first] on: products[p][i] * scale[p] > limit[i]; their number is added to counts
void mark_above(const int32_t *products, int64_t n, int64_t width, const int64_t *latent, const float *scale,
                const float *limit, uint64_t *bits, int64_t words, int64_t first, int64_t *counts, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < n; p++)
        for (int64_t start = 0; start < width; start += WORD) {
            int64_t end = width - start < WORD ? width - start : WORD;
            uint64_t word = above(products + p * width + start, scale[p], limit + start, end);
            bits[latent[p] * words + first + start / WORD] = word;
            counts[latent[p]] += __builtin_popcountll(word);
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

// order = the numbers of pairs by row, those of a row as they come; next[i], where row i begins, is moved to its end
void order_by_row(const int64_t *row, int64_t n, int64_t *next, int64_t *order, int threads)
{
    (void)threads;
    for (int64_t p = 0; p < n; p++)
        order[next[row[p]]++] = p;
}

// the k-th largest of n numbers, none of them NaN; leaves them in another order
static float kth_largest(float *x, int64_t n, int64_t k)
{
    int64_t left = 0, right = n - 1;
    while (left < right) {
        float pivot = x[left + (right - left) / 2];
        int64_t i = left, j = right;
        while (i <= j) {
            while (x[i] > pivot)
                i++;
            while (x[j] < pivot)
                j--;
            if (i <= j) {
                float swapped = x[i];
                x[i++] = x[j];
                x[j--] = swapped;
            }
        }
        if (k - 1 <= j)
            right = j;
        else if (k - 1 >= i)
            left = i;
        else
            break;
    }
    return x[k - 1];
}

// limit[r] = the k-th largest over groups g of (largest[g][r] - margin[g][r]) * unit[g], or less, by at most
// 2^-HALVINGS of the largest of them; or 0 if that is less
void limits_of_rows(const int32_t *largest, const float *margin, int64_t stride, const float *unit, int64_t n_groups,
                    int64_t n_rows, int64_t k, float *limit, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < n_rows; first += SOME) {
        float low[SOME] = {0}, high[SOME] = {0}, middle[SOME];
        int64_t n = n_rows - first < SOME ? n_rows - first : SOME;
        for (int halving = -1; halving < HALVINGS; halving++) {  // the first time finds the largest
            int32_t count[SOME] = {0};
            for (int64_t r = 0; r < SOME; r++)
                middle[r] = halving < 0 ? INFINITY : (low[r] + high[r]) / 2;
            for (int64_t g = 0; g < n_groups; g++)
#pragma omp simd
                for (int64_t r = 0; r < n; r++) {
                    float value = (largest[g * n_rows + first + r] - margin[g * stride + first + r]) * unit[g];
                    count[r] += value > middle[r];
                    high[r] = halving < 0 && value > high[r] ? value : high[r];
                }
            for (int64_t r = 0; r < n && halving >= 0; r++)
                *(count[r] >= k ? &low[r] : &high[r]) = middle[r];
        }
        memcpy(limit + first, low, n * sizeof(float));
    }
}

// kept[p]: values[p] is among the k largest of its row, of equal ones the first; order and starts are of pairs by row
void largest_of_pairs(const float *values, const int64_t *order, const int64_t *starts, int64_t n_rows, int64_t k,
                      float *by_row, uint8_t *kept, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < n_rows; r++) {
        int64_t n = starts[r + 1] - starts[r], left = k;
        const int64_t *own = order + starts[r];
        float *x = by_row + starts[r], least = -INFINITY;
        for (int64_t i = 0; i < n; i++)
            x[i] = values[own[i]];
        if (n > k)
            least = kth_largest(x, n, k);
        for (int64_t i = 0; i < n; i++)
            left -= values[own[i]] > least;
        for (int64_t i = 0; i < n; i++) {
            float value = values[own[i]];
            kept[own[i]] = value > least || (value == least && left-- > 0);
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

// ------------------------------------------------------------------------------------------- products of bytes by tiles
// Intel's AMX multiplies tiles of 16 by 64 bytes. Products of 32 latents and 64 rows are used while they are in the
// cache, and never written out: to find the largest ones first and what is above a limit then, they are made twice.
#ifdef __AMX_INT8__
enum { TILE = 16, SIDE = 2 * TILE, STEP = 64, REQUEST = 0x1023, TILES = 18 };

// whether the system lets this process use the tiles
int tiles_work(void)
{
    return syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
}

// eight tiles of 16 rows of 64 bytes; constant, since GCC 12 takes the instruction to read its first bytes only
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} LAYOUT = {
    .palette = 1,
    .bytes = {STEP, STEP, STEP, STEP, STEP, STEP, STEP, STEP},
    .rows = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE},
};

// packed[block][step][k / 4][row][k % 4], for blocks of 16 rows and steps of 64 components; zero where there are none
void pack_rows(const int8_t *rows, int64_t n, int64_t d, int8_t *packed, int64_t steps, int threads)
{
    int64_t n_blocks = (n + WORD - 1) / WORD * (WORD / TILE);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < n_blocks; block++) {
        int8_t *to = packed + block * TILE * steps * STEP;
        memset(to, 0, TILE * steps * STEP);
        for (int64_t i = 0; i < TILE && block * TILE + i < n; i++)
            for (int64_t k = 0; k < d; k++)
                to[(k / 4 * TILE + i) * 4 + k % 4] = rows[(block * TILE + i) * d + k];
    }
}

// out[i][r] = a[i] . row r of two packed blocks
static inline void tile_products(const int8_t *a, const int8_t *b, int64_t steps, int32_t *out)
{
    int64_t d = steps * STEP;
    __asm__ volatile("" ::: "memory");  // `a` is written before the tiles read it
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, a + s * STEP, d);
        _tile_loadd(5, a + TILE * d + s * STEP, d);
        _tile_loadd(6, b + s * TILE * STEP, STEP);
        _tile_loadd(7, b + TILE * d + s * TILE * STEP, STEP);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, out, WORD * sizeof(int32_t));
    _tile_stored(1, out + TILE, WORD * sizeof(int32_t));
    _tile_stored(2, out + TILE * WORD, WORD * sizeof(int32_t));
    _tile_stored(3, out + TILE * WORD + TILE, WORD * sizeof(int32_t));
}

// the products of up to 32 latents, copied to `panel`, with 64 rows
static inline void word_products(const int8_t *panel, const int8_t *packed, int64_t word, int64_t steps, int32_t *out)
{
    const int8_t *rows = packed + word * WORD * steps * STEP;
    tile_products(panel, rows, steps, out);
    tile_products(panel, rows + SIDE * steps * STEP, steps, out + SIDE);
}

static void copy_panel(const int8_t *latents, int64_t n, int64_t d, int64_t steps, int8_t *panel)
{
    memset(panel, 0, SIDE * steps * STEP);
    for (int64_t i = 0; i < SIDE && i < n; i++)
        memcpy(panel + i * steps * STEP, latents + i * d, d);
}

// as mark_above, of the products of latents with packed rows
void mark_tiles(const int8_t *latents, int64_t n, int64_t d, const int8_t *packed, int64_t n_rows, int64_t steps,
                const int64_t *latent, const float *scale, const float *limit, uint64_t *bits, int64_t words,
                int64_t first, int64_t *counts, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        int8_t panel[SIDE * steps * STEP] __attribute__((aligned(64)));
        int32_t products[SIDE * WORD] __attribute__((aligned(64)));
        _tile_loadconfig(&LAYOUT);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < n; p += SIDE) {
            copy_panel(latents + p * d, n - p, d, steps, panel);
            for (int64_t start = 0; start < n_rows; start += WORD) {
                int64_t end = n_rows - start < WORD ? n_rows - start : WORD;
                word_products(panel, packed, start / WORD, steps, products);
                for (int64_t i = 0; i < SIDE && p + i < n; i++) {
                    uint64_t word = above(products + i * WORD, scale[p + i], limit + start, end);
                    bits[latent[p + i] * words + first + start / WORD] = word;
                    counts[latent[p + i]] += __builtin_popcountll(word);
                }
            }
        }
        _tile_release();
    }
}

// largest[g][r] = max over the g-th `together` latents of their products with packed row r
void largest_of_tiles(const int8_t *latents, int64_t n, int64_t d, const int8_t *packed, int64_t n_rows, int64_t steps,
                      int64_t together, int32_t *largest, int threads)
{
    int64_t at_once = together < SIDE ? SIDE : together;
#pragma omp parallel num_threads(threads)
    {
        int8_t panel[SIDE * steps * STEP] __attribute__((aligned(64)));
        int32_t products[SIDE * WORD] __attribute__((aligned(64)));
        _tile_loadconfig(&LAYOUT);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < n; first += at_once)
            for (int64_t p = first; p < first + at_once && p < n; p += SIDE) {
                copy_panel(latents + p * d, n - p, d, steps, panel);
                for (int64_t start = 0; start < n_rows; start += WORD) {
                    int64_t end = n_rows - start < WORD ? n_rows - start : WORD;
                    word_products(panel, packed, start / WORD, steps, products);
                    for (int64_t i = 0; i < SIDE && p + i < n; i++) {
                        int32_t *most = largest + (p + i) / together * n_rows + start, *found = products + i * WORD;
                        int begin = (p + i) % together == 0;
#pragma omp simd
                        for (int64_t r = 0; r < end; r++)
                            most[r] = begin || found[r] > most[r] ? found[r] : most[r];
                    }
                }
            }
        _tile_release();
    }
}
#else
int tiles_work(void)
{
    return 0;
}
#endif
