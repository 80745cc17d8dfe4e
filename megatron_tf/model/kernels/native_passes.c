/* The elementwise passes of `l2_norm_gelu` on a CPU; see activations/l2_norm.py for the maths.

   Rows are shared out among the threads, one row is always summed by one thread: results do not depend on their number.
   bf16 is held as its upper half of an fp32; all arithmetic is fp32.
   GELU and its derivative need the normal distribution and its density. Both come from one exponential, by
   Abramowitz & Stegun 7.1.26 (off by at most 7.5e-8, which is the rounding of fp32 at 1). */

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float load_bf16(uint16_t x) { return from_bits((uint32_t)x << 16); }

static inline uint16_t round_bf16(float x) { /* to nearest, ties to even */
    uint32_t bits = to_bits(x);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float load_fp32(float x) { return x; }
static inline float round_fp32(float x) { return x; }

/* exp(x) for x <= 0, to 1 unit in the last place: x = n log 2 + f, a polynomial in f. Below -87 it is exp(-87). */
static inline float exp_of_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    return (p * f * f + f + 1.0f) * from_bits((uint32_t)((int32_t)n + 127) << 23);
}

/* The standard normal distribution at u; *density becomes its derivative. */
static inline float normal_distribution(float u, float *density) {
    float e = exp_of_negative(-0.5f * u * u);
    float t = 1.0f / (1.0f + 0.231641888f * fabsf(u));
    float p = 0.5307027145f;
    p = p * t - 0.7265760135f;
    p = p * t + 0.7107068705f;
    p = p * t - 0.142248368f;
    p = p * t + 0.127414796f;
    float tail = p * t * e;
    *density = 0.3989422804f * e;
    return u < 0.0f ? tail : 1.0f - tail;
}

/* Norms up to this count as 0, see activations/l2_norm.py. */
#define LEAST 1e-16f

/* τ/norm; 0 for a row of zeros, and NaN where the sum of squares has overflowed. */
static inline float inverse_of(float norm, float scale) {
    if (!(norm <= 3.4e38f)) /* also of NaN, which the Gram form makes of an overflow */
        return NAN;
    return norm > LEAST ? scale / norm : 0.0f;
}

/* The passes of one row: n scores a, their √Σa² (the norm), S = GELU(u) with u = τa/norm, and from d = dS
   D = τ/norm · d ∘ GELU'(u), total = ΣD∘a, product = Σd∘S and then da = D − a · total/norm². A row of zeros, or
   of numbers whose squares are lost, has no direction: all are 0. */
#define ROW_STAGES(NAME, TYPE, LOAD, ROUND)                                                                            \
    static inline float norm_of_row_##NAME(const TYPE *a, long n) {                                                    \
        float sum = 0.0f;                                                                                              \
        _Pragma("omp simd reduction(+ : sum)") for (long j = 0; j < n; j++) sum += LOAD(a[j]) * LOAD(a[j]);            \
        return sqrtf(sum);                                                                                             \
    }                                                                                                                  \
    static inline void weights_of_row_##NAME(const TYPE *a, float norm, float scale, TYPE *s, long n) {                \
        float factor = inverse_of(norm, scale);                                                                        \
        _Pragma("omp simd") for (long j = 0; j < n; j++) {                                                             \
            float density, u = LOAD(a[j]) * factor;                                                                    \
            s[j] = ROUND(u * normal_distribution(u, &density));                                                        \
        }                                                                                                              \
    }                                                                                                                  \
    static inline float backward_of_row_##NAME(const TYPE *a, float norm, float scale, TYPE *d, TYPE *s,               \
                                               float *product, long n) {                                               \
        float factor = inverse_of(norm, scale), total = 0.0f, sum = 0.0f;                                              \
        _Pragma("omp simd reduction(+ : total, sum)") for (long j = 0; j < n; j++) {                                   \
            float density, score = LOAD(a[j]), u = score * factor, p = normal_distribution(u, &density);               \
            float g = LOAD(d[j]) * (p + u * density) * factor;                                                         \
            sum += LOAD(d[j]) * u * p;                                                                                 \
            s[j] = ROUND(u * p);                                                                                       \
            d[j] = ROUND(g);                                                                                           \
            total += g * score;                                                                                        \
        }                                                                                                              \
        *product = sum;                                                                                                \
        return total;                                                                                                  \
    }                                                                                                                  \
    static inline void couple_row_##NAME(const TYPE *a, float norm, float total, TYPE *d, long n) {                    \
        float factor = norm > LEAST ? total / (norm * norm) : 0.0f;                                                    \
        _Pragma("omp simd") for (long j = 0; j < n; j++) d[j] = ROUND(LOAD(d[j]) - LOAD(a[j]) * factor);               \
    }

/* The same for all rows: a, d and s are [rows, n], norm and total [rows], each with the distance between its rows in
   elements. The last two do all of a row while it is in the cache; a row shared with other ranks must wait for them. */
#define EACH_ROW _Pragma("omp parallel for num_threads(threads)") for (long i = 0; i < rows; i++)

#define STAGES(NAME, TYPE)                                                                                             \
    void norm_##NAME(const TYPE *a, long a_stride, float *norm, long norm_stride, long rows, long n, int threads) {    \
        EACH_ROW norm[i * norm_stride] = norm_of_row_##NAME(a + i * a_stride, n);                                      \
    }                                                                                                                  \
    void weights_##NAME(const TYPE *a, long a_stride, const float *norm, long norm_stride, TYPE *s, long s_stride,     \
                        long rows, long n, int threads, float scale) {                                                 \
        EACH_ROW weights_of_row_##NAME(a + i * a_stride, norm[i * norm_stride], scale, s + i * s_stride, n);           \
    }                                                                                                                  \
    void backward_##NAME(const TYPE *a, long a_stride, const float *norm, long norm_stride, TYPE *d, long d_stride,    \
                         TYPE *s, long s_stride, float *total, long total_stride, long rows, long n, int threads,      \
                         float scale) {                                                                                \
        EACH_ROW {                                                                                                     \
            float product;                                                                                             \
            total[i * total_stride] = backward_of_row_##NAME(a + i * a_stride, norm[i * norm_stride], scale,           \
                                                             d + i * d_stride, s + i * s_stride, &product, n);         \
        }                                                                                                              \
    }                                                                                                                  \
    void backward_with_product_##NAME(const TYPE *a, long a_stride, const float *norm, long norm_stride, TYPE *d,      \
                                      long d_stride, TYPE *s, long s_stride, float *total, long total_stride,          \
                                      float *product, long product_stride, long rows, long n, int threads,             \
                                      float scale) {                                                                   \
        EACH_ROW total[i * total_stride] =                                                                             \
            backward_of_row_##NAME(a + i * a_stride, norm[i * norm_stride], scale, d + i * d_stride, s + i * s_stride, \
                                   product + i * product_stride, n);                                                   \
    }                                                                                                                  \
    void couple_##NAME(const TYPE *a, long a_stride, const float *norm, long norm_stride, const float *total,          \
                       long total_stride, TYPE *d, long d_stride, long rows, long n, int threads) {                    \
        EACH_ROW couple_row_##NAME(a + i * a_stride, norm[i * norm_stride], total[i * total_stride],                   \
                                   d + i * d_stride, n);                                                               \
    }                                                                                                                  \
    void norm_and_weights_##NAME(const TYPE *a, long a_stride, float *norm, long norm_stride, TYPE *s, long s_stride,  \
                                 long rows, long n, int threads, float scale) {                                        \
        EACH_ROW {                                                                                                     \
            float r = norm[i * norm_stride] = norm_of_row_##NAME(a + i * a_stride, n);                                 \
            weights_of_row_##NAME(a + i * a_stride, r, scale, s + i * s_stride, n);                                    \
        }                                                                                                              \
    }                                                                                                                  \
    void backward_and_couple_##NAME(const TYPE *a, long a_stride, const float *norm, long norm_stride, TYPE *d,        \
                                    long d_stride, TYPE *s, long s_stride, long rows, long n, int threads,             \
                                    float scale) {                                                                     \
        EACH_ROW {                                                                                                     \
            float r = norm[i * norm_stride], product;                                                                  \
            float total = backward_of_row_##NAME(a + i * a_stride, r, scale, d + i * d_stride, s + i * s_stride,       \
                                                 &product, n);                                                         \
            couple_row_##NAME(a + i * a_stride, r, total, d + i * d_stride, n);                                        \
        }                                                                                                              \
    }

ROW_STAGES(bf16, uint16_t, load_bf16, round_bf16)
ROW_STAGES(fp32, float, load_fp32, round_fp32)
STAGES(bf16, uint16_t)
STAGES(fp32, float)
