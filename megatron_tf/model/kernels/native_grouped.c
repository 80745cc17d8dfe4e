/* The products of candidates with the rows that chose them, on a CPU in fp32; see model/grouped.py.

   Rows of x and of the outputs are read and added to where they lie: nothing is gathered, and nothing is added up in a
   second pass. A product is made tile by tile, ROWS x COLUMNS sums that stay in registers. The matrix whose columns are
   the tile's is packed first: in panels of COLUMNS columns, so that a step reads one line after the other.
   The order of every sum is fixed, so results do not depend on the number of threads.

   The last function has the products of a stack of small matrices, by the same tiles. */

#ifdef _OPENMP
#include <omp.h>
#endif
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12
#else /* built also where there are no such vectors; vector_lanes says so */
#define LANES 8
#define ROWS 6
#endif
#define COLUMNS (2 * LANES)
#define UNROLLED _Pragma("GCC unroll 16")

/* Rows of a gradient's sums that are packed at a time, and the distance of their panels: a power of 2 would put all
   panels' beginnings into the same few places of the cache. */
#define CHUNK 128
#define CHUNK_STRIDE ((CHUNK + 1) * COLUMNS)

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int indices __attribute__((vector_size(4 * LANES)));

static inline long least(long a, long b) { return a < b ? a : b; }
static inline long blocks(long n, long size) { return (n + size - 1) / size; }

/* Numbers in a vector, 0 where the kernels were not built for this processor's. */
long vector_lanes(void) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
    return LANES;
#else
    return 0;
#endif
}

/* Floats of memory that each product of n tokens of a width wants for what it packs. */
long room(long n, long width) {
    long tokens = blocks(n, COLUMNS) * COLUMNS * width, columns = blocks(width, COLUMNS);
    long gradients = columns * CHUNK_STRIDE + blocks(n, ROWS) * ROWS * CHUNK, values = columns * COLUMNS * n;
    long most = tokens > values ? tokens : values;
    return most > gradients ? most : gradients;
}

/* sum[i] += a_i[k] b[k] for each k, where A is a_i[k] and b[k] a line of the packed panel. */
#define STEPS(A)                                                                                                       \
    for (long k = 0; k < depth; k++, b += COLUMNS) {                                                                   \
        vector left = *(const loose *)b, right = *(const loose *)(b + LANES);                                          \
        UNROLLED for (int i = 0; i < ROWS; i++) {                                                                      \
            sum[i][0] += A * left;                                                                                     \
            sum[i][1] += A * right;                                                                                    \
        }                                                                                                              \
    }

/* Puts the first `rows` and `columns` of a tile to where c points, or adds them. */
static inline __attribute__((always_inline)) void store(vector (*sum)[2], float *const *c, int rows, int columns,
                                                        int add) {
    if (columns == COLUMNS) {
        UNROLLED for (int i = 0; i < ROWS; i++) {
            if (i < rows) {
                loose *left = (loose *)c[i], *right = (loose *)(c[i] + LANES);
                if (add) {
                    sum[i][0] += *left;
                    sum[i][1] += *right;
                }
                *left = sum[i][0];
                *right = sum[i][1];
            }
        }
        return;
    }
    float all[ROWS][COLUMNS];
    memcpy(all, sum, sizeof all);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) c[i][j] = add ? c[i][j] + all[i][j] : all[i][j];
}

/* The places of a tile's results are on their way into the cache while its sums are made. */
static inline void fetch(float *const *c) {
    for (int i = 0; i < ROWS; i++) {
        __builtin_prefetch(c[i], 1);
        __builtin_prefetch(c[i] + COLUMNS - 1, 1);
    }
}

/* A tile of rows a[i] [depth]. */
static void tile_of_rows(const float *const *a, const float *b, long depth, float *const *c, int rows, int columns,
                         int add) {
    vector sum[ROWS][2] = {0};
    const float *own[ROWS];
    for (int i = 0; i < ROWS; i++) own[i] = a[i];
    fetch(c);
    STEPS(own[i][k])
    store(sum, c, rows, columns, add);
}

/* A tile of a packed a [depth, ROWS]. */
static void tile_of_packed(const float *a, const float *b, long depth, float *const *c, int rows, int columns,
                           int add) {
    vector sum[ROWS][2] = {0};
    fetch(c);
    STEPS(a[k * ROWS + i])
    store(sum, c, rows, columns, add);
}

#if defined(__GNUC__) && !defined(__clang__)
/* Swaps, in each pair of vectors `distance` apart, the blocks of as many numbers that lie off the diagonal. */
static inline __attribute__((always_inline)) void swap_blocks(vector *v, indices lane, int distance) {
    indices low = lane + (((lane & distance) != 0) & (LANES - distance)), high = low + distance;
    UNROLLED for (int i = 0; i < LANES; i++) {
        if (!(i & distance)) {
            vector a = v[i], b = v[i + distance];
            v[i] = __builtin_shuffle(a, b, low);
            v[i + distance] = __builtin_shuffle(a, b, high);
        }
    }
}

/* LANES x LANES numbers, their rows `stride` apart, into rows `to_stride` apart. */
static inline void transpose(const float *from, long stride, float *to, long to_stride) {
    vector v[LANES];
    indices lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    UNROLLED for (int i = 0; i < LANES; i++) v[i] = *(const loose *)(from + i * stride);
    swap_blocks(v, lane, 1);
    swap_blocks(v, lane, 2);
    swap_blocks(v, lane, 4);
#if LANES == 16
    swap_blocks(v, lane, 8);
#endif
    UNROLLED for (int i = 0; i < LANES; i++) *(loose *)(to + i * to_stride) = v[i];
}
#else
static inline void transpose(const float *from, long stride, float *to, long to_stride) {
    for (int k = 0; k < LANES; k++)
        for (int i = 0; i < LANES; i++) to[k * to_stride + i] = from[i * stride + k];
}
#endif

/* A panel of COLUMNS tokens as columns, [width, COLUMNS], zeros behind the last; tokens are `count` times [width]. */
static void pack_tokens(const float *tokens, long count, long width, float *to) {
    long whole = count < COLUMNS ? 0 : width / LANES * LANES;
    for (long i = 0; i < COLUMNS; i += LANES)
        for (long start = 0; start < whole; start += LANES)
            transpose(tokens + i * width + start, width, to + start * COLUMNS + i, COLUMNS);
    for (long k = whole; k < width; k++)
        for (long i = 0; i < COLUMNS; i++) to[k * COLUMNS + i] = i < count ? tokens[i * width + k] : 0.0f;
}

/* One line of a panel: `count` numbers, and zeros. */
static inline void pack_line(const float *from, long count, float *to) {
    if (count >= COLUMNS) {
        *(loose *)to = *(const loose *)from;
        *(loose *)(to + LANES) = *(const loose *)(from + LANES);
        return;
    }
    for (long i = 0; i < COLUMNS; i++) to[i] = i < count ? from[i] : 0.0f;
}

/* out[i] = x[rows[i]] tokens^T for i < count; out [count, n], tokens [n, width]. */
static void scores_of_candidate(const float *x, long x_stride, const int32_t *rows, long count, const float *tokens,
                                long n, long width, float *out, long out_stride, float *packed, int threads) {
    long panels = blocks(n, COLUMNS);
#pragma omp parallel num_threads(threads) if (count > ROWS)
    {
#pragma omp for
        for (long panel = 0; panel < panels; panel++)
            pack_tokens(tokens + panel * COLUMNS * width, least(COLUMNS, n - panel * COLUMNS), width,
                        packed + panel * width * COLUMNS);
#pragma omp for
        for (long first = 0; first < count; first += ROWS) {
            const float *a[ROWS];
            float *c[ROWS];
            for (int i = 0; i < ROWS; i++) a[i] = x + rows[least(first + i, count - 1)] * x_stride;
            for (long panel = 0; panel < panels; panel++) {
                for (int i = 0; i < ROWS; i++)
                    c[i] = out + least(first + i, count - 1) * out_stride + panel * COLUMNS;
                tile_of_rows(a, packed + panel * width * COLUMNS, width, c, least(ROWS, count - first),
                             least(COLUMNS, n - panel * COLUMNS), 0);
            }
        }
    }
}

/* total[rows[i]] += scores[i] tokens for i < count; scores [count, n], tokens [n, width]. Each row is there once. */
static void add_outputs_of_candidate(const float *scores, long scores_stride, const int32_t *rows, long count,
                                     const float *tokens, long n, long width, float *total, long total_stride,
                                     float *packed, int threads) {
    long panels = blocks(width, COLUMNS);
#pragma omp parallel num_threads(threads) if (count > ROWS)
    {
#pragma omp for
        for (long k = 0; k < n; k++)
            for (long panel = 0; panel < panels; panel++)
                pack_line(tokens + k * width + panel * COLUMNS, width - panel * COLUMNS,
                          packed + (panel * n + k) * COLUMNS);
#pragma omp for
        for (long first = 0; first < count; first += ROWS) {
            const float *a[ROWS];
            float *c[ROWS];
            for (int i = 0; i < ROWS; i++) a[i] = scores + least(first + i, count - 1) * scores_stride;
            for (long panel = 0; panel < panels; panel++) {
                for (int i = 0; i < ROWS; i++)
                    c[i] = total + rows[least(first + i, count - 1)] * total_stride + panel * COLUMNS;
                tile_of_rows(a, packed + panel * n * COLUMNS, n, c, least(ROWS, count - first),
                             least(COLUMNS, width - panel * COLUMNS), 1);
            }
        }
    }
}

/* out = sum of scores[i]^T x[rows[i]] over i < count; scores [count, n], out [n, width]. */
static void gradients_of_candidate(const float *scores, long scores_stride, const int32_t *rows, long count,
                                   const float *x, long x_stride, float *out, long n, long width, float *packed,
                                   int threads) {
    long panels = blocks(width, COLUMNS), token_blocks = blocks(n, ROWS);
    float *packed_scores = packed + panels * CHUNK_STRIDE;
#pragma omp parallel num_threads(threads) if (count > ROWS)
    for (long start = 0; start < count; start += CHUNK) {
        long depth = least(CHUNK, count - start);
#pragma omp for nowait
        for (long some = 0; some < depth; some += 16)
            for (long block = 0; block < token_blocks; block++) {
                long wide = least(ROWS, n - block * ROWS);
                for (long k = some; k < least(some + 16, depth); k++) {
                    const float *from = scores + (start + k) * scores_stride + block * ROWS;
                    float *to = packed_scores + (block * CHUNK + k) * ROWS;
                    if (wide == ROWS)
                        memcpy(to, from, sizeof(float) * ROWS);
                    else
                        for (int i = 0; i < ROWS; i++) to[i] = i < wide ? from[i] : 0.0f;
                }
            }
#pragma omp for
        for (long k = 0; k < depth; k++) {
            const float *from = x + rows[start + k] * x_stride;
            const float *next = x + rows[least(start + k + 4, count - 1)] * x_stride;
            for (long panel = 0; panel < panels; panel++) {
                __builtin_prefetch(next + panel * COLUMNS);
                __builtin_prefetch(next + panel * COLUMNS + LANES);
                pack_line(from + panel * COLUMNS, width - panel * COLUMNS, packed + panel * CHUNK_STRIDE + k * COLUMNS);
            }
        }
#pragma omp for collapse(2)
        for (long block = 0; block < token_blocks; block++)
            for (long panel = 0; panel < panels; panel++) {
                float *c[ROWS];
                for (int i = 0; i < ROWS; i++)
                    c[i] = out + least(block * ROWS + i, n - 1) * width + panel * COLUMNS;
                tile_of_packed(packed_scores + block * CHUNK * ROWS, packed + panel * CHUNK_STRIDE, depth, c,
                               least(ROWS, n - block * ROWS), least(COLUMNS, width - panel * COLUMNS), start > 0);
            }
    }
}

/* The same for several candidates, whose tokens lie one after another. The rows of candidate g end with row
   ends[g] - begin. */
#define FOR_CANDIDATES                                                                                                 \
    for (long g = 0, first = 0, next = 0; g < candidates; g++, first = next)                                           \
        if ((next = ends[g] - begin) > first)

void scores(const float *x, long x_stride, const int32_t *rows, const int32_t *ends, long begin, long candidates,
            const float *tokens, long n, long width, float *out, long out_stride, float *packed, int threads) {
    FOR_CANDIDATES scores_of_candidate(x, x_stride, rows + first, next - first, tokens + g * n * width, n, width,
                                       out + first * out_stride, out_stride, packed, threads);
}

void add_outputs(const float *scores, long scores_stride, const int32_t *rows, const int32_t *ends, long begin,
                 long candidates, const float *tokens, long n, long width, float *total, long total_stride,
                 float *packed, int threads) {
    FOR_CANDIDATES add_outputs_of_candidate(scores + first * scores_stride, scores_stride, rows + first, next - first,
                                            tokens + g * n * width, n, width, total, total_stride, packed, threads);
}

void gradients(const float *scores, long scores_stride, const int32_t *rows, const int32_t *ends, long begin,
               long candidates, const float *x, long x_stride, float *out, long n, long width, float *packed,
               int threads) {
    FOR_CANDIDATES gradients_of_candidate(scores + first * scores_stride, scores_stride, rows + first, next - first, x,
                                          x_stride, out + g * n * width, n, width, packed, threads);
}

/* c = alpha times the sum of a tile of rows a[i] [depth] and beta times one of `from`, for its first `rows` and
   `columns`. Of two scaled terms a compiler would round one or the other first, and symmetric places differently. */
static void add_tile(const float *const *a, const float *b, long depth, const float *from, float *c, long stride,
                     int rows, int columns, float alpha, float beta) {
    vector sum[ROWS][2] = {0};
    const float *own[ROWS];
    for (int i = 0; i < ROWS; i++) {
        own[i] = a[i];
        __builtin_prefetch(c + least(i, rows - 1) * stride, 1);
    }
    STEPS(own[i][k])
    if (columns == COLUMNS) {
        UNROLLED for (int i = 0; i < ROWS; i++) {
            if (i < rows) {
                for (int part = 0; part < 2; part++) {
                    long place = i * stride + part * LANES;
                    if (beta) sum[i][part] += beta * *(const loose *)(from + place);
                    *(loose *)(c + place) = alpha * sum[i][part];
                }
            }
        }
        return;
    }
    float all[ROWS][COLUMNS];
    memcpy(all, sum, sizeof all);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++)
            c[i * stride + j] = alpha * (beta ? all[i][j] + beta * from[i * stride + j] : all[i][j]);
}

/* Whether a tile lies below the diagonal, so that symmetry gives it. */
static inline int is_below(long first, long panel) { return first >= (panel + 1) * COLUMNS; }

/* Makes a matrix c [n, n] symmetric whose tiles below the diagonal are not known. */
static void mirror(float *c, long n) {
    long whole = n / LANES * LANES;
    for (long i = 0; i < whole; i += LANES)
        for (long j = 0; j < i; j += LANES) transpose(c + j * n + i, n, c + i * n + j, n);
    for (long i = whole; i < n; i++)
        for (long j = 0; j < i; j++) c[i * n + j] = c[j * n + i];
}

/* out[s] = alpha left[s] right[s] + beta total[s] for s < stack; left [n, depth], right [depth, width], or, if it is
   transposed, [width, depth]. Out may be total. Alpha is not 0, and a beta of 0 ignores total. With `symmetric` half of
   the product is made: the result is symmetric, and so is total, unless beta is 0. `packed` has memory for each
   thread. */
void add_products(float *out, const float *total, const float *left, const float *right, long stack, long n,
                  long depth, long width, int transposed, int symmetric, float alpha, float beta, float *packed,
                  int threads) {
    long panels = blocks(width, COLUMNS);
#pragma omp parallel for num_threads(threads)
    for (long s = 0; s < stack; s++) {
        const float *x = left + s * n * depth, *y = right + s * depth * width;
        const float *from = total + s * n * width;
        float *c = out + s * n * width, *own = packed;
#ifdef _OPENMP
        own += omp_get_thread_num() * COLUMNS * depth;
#endif
        for (long panel = 0; panel < panels; panel++) {
            long start = panel * COLUMNS, count = least(COLUMNS, width - start);
            if (transposed)
                pack_tokens(y + start * depth, count, depth, own);
            else
                for (long k = 0; k < depth; k++) pack_line(y + k * width + start, count, own + k * COLUMNS);
            for (long first = 0; first < n && (!symmetric || !is_below(first, panel)); first += ROWS) {
                const float *a[ROWS];
                for (int i = 0; i < ROWS; i++) a[i] = x + least(first + i, n - 1) * depth;
                add_tile(a, own, depth, from + first * width + start, c + first * width + start, width,
                         least(ROWS, n - first), count, alpha, beta / alpha);
            }
        }
        if (symmetric) mirror(c, n);
    }
}
