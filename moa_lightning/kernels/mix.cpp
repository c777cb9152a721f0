// The mix of activations on the CPU, forward and backward, in one pass over memory; moa_lightning/kernels/cpp.py builds
// and calls it. Formulas: kernels/__init__.py. Written with the vector types that GCC and Clang share, so that one source
// serves AVX-512, AVX2 and Arm. One exponential exp(-|u|) gives sigmoid, SiLU and tanh; one exp(-u²/2) gives the normal
// density and, times a polynomial, its distribution function, hence GELU and its slope. A row is computed without a
// thought for 0 · inf; where a number of it is not finite it is computed again, entries with coefficient 0 left out.
//
// Compile with -DENTRIES=<Entry, ...> -DFORM=<plain|one|both|pairs>.

#include <cstdint>
#include <cstring>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4;

typedef float Vec __attribute__((vector_size(BYTES)));
typedef int32_t Int __attribute__((vector_size(BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BYTES)));
typedef uint16_t Half __attribute__((vector_size(BYTES / 2)));

#define INLINE inline __attribute__((always_inline))

enum Entry { identity, gelu, silu, relu, leaky_relu, relu2, tanh_, gelu_tanh, quick_gelu, sigmoid };
enum Form { plain, one, both, pairs };

constexpr Entry entries[] = {ENTRIES};
constexpr int K = sizeof(entries) / sizeof(Entry);
constexpr Form form = FORM;
constexpr int C = form == pairs ? K * K : K;  // coefficients a token in c

constexpr bool has(Entry entry) {
    for (Entry e : entries)
        if (e == entry) return true;
    return false;
}

INLINE Vec all(float x) { return Vec{} + x; }
INLINE Vec below_zero(Vec u, Vec yes, Vec no) { return u < 0.0f ? yes : no; }
INLINE Vec magnitude(Vec u) { return (Vec)((Int)u & 0x7fffffff); }
INLINE Vec at_most(Vec a, float limit) { return a > limit ? all(limit) : a; }  // NaN stays NaN

template <class F, int... k>
INLINE void each(F f, std::integer_sequence<int, k...>) {
    (f(std::integral_constant<int, k>{}), ...);
}
#define EACH(k) each([&](auto k) __attribute__((always_inline)) {
#define END }, std::make_integer_sequence<int, K>{})

// exp(x) = scale + rest for -88 < x <= 0, with scale a power of two; rest + (scale - 1) is expm1(x) without
// cancellation. The polynomial is our own minimax fit on |r| <= ln(2) / 2, 1e-7 relative.
INLINE void exponential(Vec x, Vec& scale, Vec& rest) {
    const float round = 12582912.0f;  // 1.5 · 2^23: adding it leaves the nearest integer in the low bits
    Vec n = x * 1.44269504f + round;
    scale = (Vec)(((Int)n << 23) + 0x3f800000);
    n = n - round;
    Vec r = x - n * 0.693147181f, rr = r * r;  // float's ln(2) is off by 2e-9 only, so one step is enough
    Vec low = r * 0.166671151f + 0.499992307f, high = r * 8.31250788e-3f + 4.18902733e-2f;
    rest = ((high * rr + low) * rr + r) * scale;
}

// sigmoid(z) and its slope at |z| <= 87
INLINE void logistic(Vec z, Vec& value, Vec& slope) {
    Vec scale, rest;
    exponential(-magnitude(z), scale, rest);
    Vec e = scale + rest, i = 1.0f / (1.0f + e), ei = e * i;
    value = below_zero(z, ei, i);
    slope = ei * i;
}

struct Activated {
    Vec value[K], slope[K];
};

INLINE void tails(Vec u, Vec a, Vec& s, Vec& s_slope, Vec& t, Vec& t_slope) {  // sigmoid and tanh from exp(-|u|)
    Vec scale, rest;
    exponential(-at_most(a, 87.0f), scale, rest);
    Vec m = rest + (scale - 1.0f), e = 1.0f + m;
    Vec i = 1.0f / (1.0f + e), j = 1.0f / (1.0f + e * e), ei = e * i, ej = e * j;
    s = below_zero(u, ei, i);
    s_slope = ei * i;
    t = m * (-2.0f - m) * j;  // (1 - e²) / (1 + e²)
    t = below_zero(u, -t, t);
    t_slope = 4.0f * ej * ej;
}

// The normal density and distribution function. Φ(-a) / φ(a), Mills' ratio, is t · P(t) with t = 1 / (1 + 0.34 a):
// P is our own minimax fit of Φ(-a), off by 2e-8, and in the tail by 9e-6 of the value.
INLINE void normal(Vec u, Vec a, Vec& density, Vec& distribution) {
    Vec x = at_most(a, 13.0f), scale, rest;
    exponential(x * x * -0.5f, scale, rest);
    density = a > 13.0f ? all(0.0f) : (scale + rest) * 0.398942280f;  // below 8e-38
    Vec t = 1.0f / (x * 0.34f + 1.0f), tt = t * t;
    Vec p01 = t * 0.32620455f + 0.34086876f, p23 = t * -0.06935425f + 0.38859857f, p45 = t * -0.49827540f + 0.65386304f;
    Vec tail = ((tt * 0.11140884f + p45) * (tt * tt) + (tt * p23 + p01)) * t * density;
    distribution = below_zero(u, tail, 1.0f - tail);
}

// σ_k(u) and, where asked, σ_k'(u). Infinite u gives the limits.
INLINE Activated activate(Vec u) {
    Activated out;
    Vec a = magnitude(u), near = below_zero(u, -at_most(a, 87.0f), at_most(a, 87.0f));
    Vec s{}, s_slope{}, t{}, t_slope{}, density{}, distribution{};
    if constexpr (has(silu) || has(tanh_) || has(sigmoid)) tails(u, a, s, s_slope, t, t_slope);
    if constexpr (has(gelu)) normal(u, a, density, distribution);
    Vec finite = u < -3.4e38f ? all(-3.4e38f) : u;  // factors that have vanished by then make it 0
    Vec positive = below_zero(u, all(0.0f), u), side = u > 0.0f ? all(1.0f) : all(0.0f);
    EACH(k)
        constexpr Entry entry = entries[k];
        Vec &v = out.value[k], &d = out.slope[k];
        if constexpr (entry == identity) v = u, d = all(1.0f);
        if constexpr (entry == gelu) v = finite * distribution, d = distribution + near * density;
        if constexpr (entry == silu) v = finite * s, d = s + near * s_slope;
        if constexpr (entry == relu) v = positive, d = side;
        if constexpr (entry == leaky_relu) v = below_zero(u, 0.01f * u, u), d = u > 0.0f ? all(1.0f) : all(0.01f);
        if constexpr (entry == relu2) v = positive * positive, d = positive + positive;
        if constexpr (entry == tanh_) v = t, d = t_slope;
        if constexpr (entry == sigmoid) v = s, d = s_slope;
        if constexpr (entry == gelu_tanh) {
            Vec x = below_zero(u, -at_most(a, 10.0f), at_most(a, 10.0f)), xx = x * x, p, slope;
            logistic(x * (xx * 0.0713548163f + 1.59576912f), p, slope);  // x · sigmoid(2 sqrt(2/π) (x + 0.044715 x³))
            p = a > 10.0f ? side : p;
            v = finite * p, d = p + x * (a > 10.0f ? all(0.0f) : slope) * (xx * 0.214064449f + 1.59576912f);
        }
        if constexpr (entry == quick_gelu) {
            Vec x = below_zero(u, -at_most(a, 50.0f), at_most(a, 50.0f)), p, slope;
            logistic(1.702f * x, p, slope);
            p = a > 50.0f ? side : p;
            v = finite * p, d = p + 1.702f * x * slope;
        }
    END;
    return out;
}

// --- memory: float and bfloat16 (as its 16 bits), whole vectors and the last, shorter one ------------------------------

INLINE Vec read(const float* p, int n) {
    Vec v{};
    if (n == LANES) std::memcpy(&v, p, sizeof v);
    else std::memcpy(&v, p, 4 * n);
    return v;
}
INLINE Vec read(const uint16_t* p, int n) {
    Half half{};
    if (n == LANES) std::memcpy(&half, p, sizeof half);
    else std::memcpy(&half, p, 2 * n);
    return (Vec)(__builtin_convertvector(half, Bits) << 16);
}
INLINE void write(float* p, Vec v, int n) {
    if (n == LANES) std::memcpy(p, &v, sizeof v);
    else std::memcpy(p, &v, 4 * n);
}
INLINE void write(uint16_t* p, Vec v, int n) {
    Bits bits = (Bits)v;
    bits = bits + 0x7fff + ((bits >> 16) & 1);  // to the nearest, ties to even
    bits = v != v ? Bits{} + 0x7fc00000u : bits;
    Half half = __builtin_convertvector(bits >> 16, Half);
    if (n == LANES) std::memcpy(p, &half, sizeof half);
    else std::memcpy(p, &half, 2 * n);
}
INLINE float total(Vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

// --- one row: a token -------------------------------------------------------------------------------------------------

template <bool careful>
INLINE Vec times(float c, Vec v) {
    if constexpr (careful) return c == 0.0f ? all(0.0f) : c * v;
    return c * v;
}

template <bool careful>
INLINE Vec sum(const float* c, const Vec* v) {
    Vec out{};
    EACH(k) out += times<careful>(c[k], v[k]); END;
    return out;
}

template <bool careful>
INLINE Vec sum_pairs(const float* c, const Vec* first, const Vec* second) {
    Vec out{};
    EACH(k)
        if constexpr (careful) EACH(l) out += times<true>(c[k * K + l], first[k] * second[l]); END;
        else out += first[k] * sum<false>(c + k * K, second);
    END;
    return out;
}

template <bool careful, class T>
bool forward_row(const T* a, const T* b, const float* c, const float* e, T* y, int64_t h) {
    Vec spoilt{};
    auto step = [&](int64_t j, int n) __attribute__((always_inline)) {
        Activated first = activate(read(a + j, n));
        Vec out;
        if constexpr (form == pairs) {
            out = sum_pairs<careful>(c, first.value, activate(read(b + j, n)).value);
        } else {
            out = sum<careful>(c, first.value);
            if constexpr (form == one) out *= read(b + j, n);
            if constexpr (form == both) out *= sum<careful>(e, activate(read(b + j, n)).value);
        }
        if constexpr (!careful) spoilt += out * 0.0f;
        write(y + j, out, n);
    };
    int64_t j = 0;
    for (; j + LANES <= h; j += LANES) step(j, LANES);
    if (j < h) step(j, h - j);
    return total(spoilt) == 0.0f;
}

template <bool careful, class T>
bool backward_row(const T* g, const T* a, const T* b, const float* c, const float* e, T* da, T* db, float* dc,
                  float* de, int64_t h) {
    Vec sums[C]{}, other_sums[K]{}, spoilt{};
    auto step = [&](int64_t j, int n) __attribute__((always_inline)) {
        Vec grad = read(g + j, n), slope, other_slope{};
        Activated first = activate(read(a + j, n));
        if constexpr (form == plain) {
            EACH(k) sums[k] += grad * first.value[k]; END;
            slope = grad * sum<careful>(c, first.slope);
        } else if constexpr (form == pairs) {
            Activated second = activate(read(b + j, n));
            EACH(k)
                Vec weighted = grad * first.value[k];
                EACH(l) sums[k * K + l] += weighted * second.value[l]; END;
            END;
            slope = grad * sum_pairs<careful>(c, first.slope, second.value);
            other_slope = grad * sum_pairs<careful>(c, first.value, second.slope);
        } else {
            Vec other = read(b + j, n), mixed = sum<careful>(c, first.value);
            if constexpr (form == both) {
                Activated second = activate(other);
                Vec weighted = grad * mixed;
                EACH(k) other_sums[k] += weighted * second.value[k]; END;
                other = sum<careful>(e, second.value);
                other_slope = weighted * sum<careful>(e, second.slope);
            } else {
                other_slope = grad * mixed;
            }
            Vec weighted = grad * other;
            EACH(k) sums[k] += weighted * first.value[k]; END;
            slope = weighted * sum<careful>(c, first.slope);
        }
        if constexpr (!careful) spoilt += (slope + other_slope) * 0.0f;
        write(da + j, slope, n);
        if constexpr (form != plain) write(db + j, other_slope, n);
    };
    int64_t j = 0;
    for (; j + LANES <= h; j += LANES) step(j, LANES);
    if (j < h) step(j, h - j);
    if (total(spoilt) != 0.0f) return false;
    for (int k = 0; k < C; k++) dc[k] = total(sums[k]);
    if constexpr (form == both)
        for (int k = 0; k < K; k++) de[k] = total(other_sums[k]);
    return true;
}

// Rows are `stride` numbers apart; coefficients C (c) and K (e) apart, or 0 where all tokens share them.
template <class T>
void forward(const T* a, const T* b, const float* c, const float* e, T* y, const int64_t* sizes) {
    const int64_t rows = sizes[0], h = sizes[1], a_stride = sizes[2], b_stride = sizes[3], c_stride = sizes[4],
                  e_stride = sizes[5];
#pragma omp parallel for num_threads((int)sizes[7]) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        const T *an = a + n * a_stride, *bn = b + n * b_stride;
        const float *cn = c + n * c_stride, *en = e + n * e_stride;
        if (!forward_row<false>(an, bn, cn, en, y + n * h, h)) forward_row<true>(an, bn, cn, en, y + n * h, h);
    }
}

template <class T>
void backward(const T* g, const T* a, const T* b, const float* c, const float* e, T* da, T* db, float* dc, float* de,
              const int64_t* sizes) {
    const int64_t rows = sizes[0], h = sizes[1], a_stride = sizes[2], b_stride = sizes[3], c_stride = sizes[4],
                  e_stride = sizes[5], g_stride = sizes[6];
#pragma omp parallel for num_threads((int)sizes[7]) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        const T *gn = g + n * g_stride, *an = a + n * a_stride, *bn = b + n * b_stride;
        const float *cn = c + n * c_stride, *en = e + n * e_stride;
        T *dan = da + n * h, *dbn = db + n * h;
        float *dcn = dc + n * C, *den = de + n * K;
        if (!backward_row<false>(gn, an, bn, cn, en, dan, dbn, dcn, den, h))
            backward_row<true>(gn, an, bn, cn, en, dan, dbn, dcn, den, h);
    }
}

}  // namespace

#define EXPORT(name, T)                                                                                               \
    extern "C" void forward_##name(const T* a, const T* b, const float* c, const float* e, T* y, const int64_t* s) {  \
        forward<T>(a, b, c, e, y, s);                                                                                 \
    }                                                                                                                 \
    extern "C" void backward_##name(const T* g, const T* a, const T* b, const float* c, const float* e, T* da, T* db, \
                                    float* dc, float* de, const int64_t* s) {                                         \
        backward<T>(g, a, b, c, e, da, db, dc, de, s);                                                                \
    }
EXPORT(float32, float)
EXPORT(bfloat16, uint16_t)
