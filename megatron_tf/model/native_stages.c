/* The elementwise stages of `l2_norm_gelu` on a CPU, each one pass over the scores; see row_stages.py for the maths.

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

/* Tensors are [rows, n], with a distance between rows in elements; norms, inverse, total and coupling are [rows]. */
#define STAGES(NAME, TYPE, LOAD, ROUND)                                                                                \
    /* norms = √ΣA² */                                                                                                 \
    void norm_##NAME(const TYPE *scores, long stride, float *norms, long rows, long n, int threads) {                  \
        _Pragma("omp parallel for num_threads(threads)") for (long i = 0; i < rows; i++) {                             \
            const TYPE *a = scores + i * stride;                                                                       \
            float sum = 0.0f;                                                                                          \
            _Pragma("omp simd reduction(+ : sum)") for (long j = 0; j < n; j++) sum += LOAD(a[j]) * LOAD(a[j]);        \
            norms[i] = sqrtf(sum);                                                                                     \
        }                                                                                                              \
    }                                                                                                                  \
    /* S = GELU(A · inverse) */                                                                                        \
    void weights_##NAME(const TYPE *scores, long stride, const float *inverse, TYPE *weights, long rows, long n,       \
                        int threads) {                                                                                 \
        _Pragma("omp parallel for num_threads(threads)") for (long i = 0; i < rows; i++) {                             \
            const TYPE *a = scores + i * stride;                                                                       \
            TYPE *s = weights + i * n;                                                                                 \
            float scale = inverse[i];                                                                                  \
            _Pragma("omp simd") for (long j = 0; j < n; j++) {                                                         \
                float density, u = LOAD(a[j]) * scale;                                                                 \
                s[j] = ROUND(u * normal_distribution(u, &density));                                                    \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    /* S = GELU(U), D = inverse · D ∘ GELU'(U) in place, total = ΣD∘A, with U = A · inverse */                         \
    void backward_##NAME(const TYPE *scores, long stride, const float *inverse, TYPE *gradient, long gradient_stride,  \
                         TYPE *weights, float *total, long rows, long n, int threads) {                                \
        _Pragma("omp parallel for num_threads(threads)") for (long i = 0; i < rows; i++) {                             \
            const TYPE *a = scores + i * stride;                                                                       \
            TYPE *d = gradient + i * gradient_stride, *s = weights + i * n;                                            \
            float scale = inverse[i], sum = 0.0f;                                                                      \
            _Pragma("omp simd reduction(+ : sum)") for (long j = 0; j < n; j++) {                                      \
                float density, score = LOAD(a[j]), u = score * scale, p = normal_distribution(u, &density);            \
                float g = LOAD(d[j]) * (p + u * density) * scale;                                                      \
                s[j] = ROUND(u * p);                                                                                   \
                d[j] = ROUND(g);                                                                                       \
                sum += g * score;                                                                                      \
            }                                                                                                          \
            total[i] = sum;                                                                                            \
        }                                                                                                              \
    }                                                                                                                  \
    /* D -= A · coupling, in place */                                                                                  \
    void couple_##NAME(TYPE *gradient, long gradient_stride, const TYPE *scores, long stride, const float *coupling,   \
                       long rows, long n, int threads) {                                                               \
        _Pragma("omp parallel for num_threads(threads)") for (long i = 0; i < rows; i++) {                             \
            const TYPE *a = scores + i * stride;                                                                       \
            TYPE *d = gradient + i * gradient_stride;                                                                  \
            float factor = coupling[i];                                                                                \
            _Pragma("omp simd") for (long j = 0; j < n; j++) d[j] = ROUND(LOAD(d[j]) - LOAD(a[j]) * factor);           \
        }                                                                                                              \
    }

STAGES(bf16, uint16_t, load_bf16, round_bf16)
STAGES(fp32, float, load_fp32, round_fp32)
