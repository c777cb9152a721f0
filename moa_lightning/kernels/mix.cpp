// The mix of activations on the CPU, forward and backward, in one pass over memory; moa_lightning/kernels/cpp.py builds
// and calls it. Formulas: kernels/__init__.py. Written with the vector types that GCC and Clang share, so that one
// source serves AVX-512, AVX2 and Arm.
//
// Every entry is a sum of bases: 1, u, max(u, 0), its square, and a smooth part in |u|, even or odd. GELU is
// max(u, 0) - |u| Φ(-|u|), SiLU likewise, tanh is odd. The coefficients of a row's entries become those of the bases,
// the row is mixed, and gradients go back from bases to entries after it. With AVX-512 a part is a polynomial that is
// looked up piece by piece in one register; elsewhere one exponential exp(-|u|) gives the parts of SiLU, sigmoid and
// tanh, and one exp(-u²/2) that of GELU. A row is computed without a thought for 0 · inf; where a number of it is not
// finite it is computed again, bases with coefficient 0 left out.
//
// Compile with -DENTRIES=<Entry, ...> -DFORM=<plain|one|both|pairs>.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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
enum Base {
    constant, line, ramp, square, gelu_part, silu_part, gelu_tanh_part, quick_gelu_part, tanh_part, sigmoid_part
};
enum Form { plain, one, both, pairs };

constexpr Entry entries[] = {ENTRIES};
constexpr int K = sizeof(entries) / sizeof(Entry);
constexpr Form form = FORM;
constexpr int C = form == pairs ? K * K : K;  // coefficients a token in c

// how much of a base an entry holds
constexpr float share(Entry entry, Base base) {
    switch (base) {
        case constant: return entry == sigmoid ? 0.5f : 0.0f;
        case line: return entry == identity ? 1.0f : entry == leaky_relu ? 0.01f : 0.0f;
        case ramp:
            if (entry == leaky_relu) return 0.99f;
            return entry == relu || entry == gelu || entry == silu || entry == gelu_tanh || entry == quick_gelu;
        case square: return entry == relu2;
        case gelu_part: return entry == gelu;
        case silu_part: return entry == silu;
        case gelu_tanh_part: return entry == gelu_tanh;
        case quick_gelu_part: return entry == quick_gelu;
        case tanh_part: return entry == tanh_;
        case sigmoid_part: return entry == sigmoid;
    }
    return 0.0f;
}
constexpr bool smooth(Base base) { return base >= gelu_part; }
constexpr bool odd(Base base) { return base == tanh_part || base == sigmoid_part; }  // the other parts are even

constexpr bool needed(Base base) {
    for (Entry entry : entries)
        if (share(entry, base) != 0.0f) return true;
    return false;
}
constexpr int count() {
    int n = 0;
    for (int base = constant; base <= sigmoid_part; base++) n += needed(Base(base));
    return n;
}
constexpr int B = count(), S = form == pairs ? B * B : B;  // bases, and their coefficients a token
struct Bases {
    Base at[B];
};
constexpr Bases listed() {
    Bases found{};
    int n = 0;
    for (int base = constant; base <= sigmoid_part; base++)
        if (needed(Base(base))) found.at[n++] = Base(base);
    return found;
}
constexpr Bases bases = listed();

INLINE Vec all(float x) { return Vec{} + x; }
INLINE Vec magnitude(Vec u) { return (Vec)((Int)u & 0x7fffffff); }
INLINE Vec at_most(Vec a, float limit) { return a > limit ? all(limit) : a; }  // NaN stays NaN

template <class F, int... i>
INLINE void each(F f, std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
}
#define EACH(n, i) each([&](auto i) __attribute__((always_inline)) {
#define END(n) }, std::make_integer_sequence<int, n>{})

// --- the smooth parts at a = |u|: value and slope in a ---------------------------------------------------------------

#if defined(__AVX512F__)
// A part is 16 polynomials in the distance from the left end of a piece of the line, four pieces for each octave of
// 1 + a / UNIT. They meet the slope in Chebyshev's nodes and are integrated, when the library is loaded. They are off by
// 7e-8 and slopes by 4e-7, of degree 5, enough for bfloat16's 8 bits, by 6e-7 and 8e-6. The last piece bends to the limit
// and to no slope, which for SiLU are 3e-7 away, and beyond it a part stays at them.
constexpr int PIECES = 16, HIGHEST = 7;
constexpr float UNIT = 1.2f, LAST = 17.9999f;
constexpr double PI = 3.14159265358979324;
template <class T>
constexpr int degree(Base part) {
    return sizeof(T) == 2 ? 5 : part == tanh_part ? HIGHEST : 6;  // tanh bends most
}

template <class T>
constexpr int highest() {  // 0 where there is no part
    int found = 0;
    for (Base base : bases.at)
        if (smooth(base) && degree<T>(base) > found) found = degree<T>(base);
    return found;
}

struct Polynomials {
    Vec at[HIGHEST + 1];  // of each degree the coefficients of the 16 pieces
};
struct Sides {
    Vec at[HIGHEST + 1][2];
};

double exact(Base part, double a, bool slope) {
    if (part == gelu_part) {
        double tail = std::erfc(a * std::sqrt(0.5)) / 2;
        return slope ? a * std::exp(-a * a / 2) / std::sqrt(2 * PI) - tail : -a * tail;
    }
    if (part == tanh_part) return slope ? 1 / (std::cosh(a) * std::cosh(a)) : std::tanh(a);
    double z = a, dz = 1;
    if (part == quick_gelu_part) z *= dz = 1.702;
    if (part == gelu_tanh_part) {
        z = std::sqrt(8 / PI) * (a + 0.044715 * a * a * a);
        dz = std::sqrt(8 / PI) * (1 + 3 * 0.044715 * a * a);
    }
    double e = std::exp(-z), i = 1 / (1 + e);
    if (part == sigmoid_part) return slope ? e * i * i : std::tanh(a / 2) / 2;
    return slope ? e * i * (a * i * dz - 1) : -a * e * i;
}

template <int D>
Polynomials fit(Base part) {
    Polynomials found{};
    for (int p = 0; p < PIECES; p++) {
        double left = UNIT * (std::ldexp(1 + p % 4 / 4.0, p / 4) - 1), width = UNIT * std::ldexp(0.25, p / 4);
        double x[D], d[D], powers[D] = {};
        for (int n = 0; n < D; n++) {
            x[n] = (1 - std::cos(PI * (n + 0.5) / D)) / 2 * width;
            d[n] = exact(part, left + x[n], true);
        }
        for (int order = 1; order < D; order++)  // Newton's divided differences
            for (int n = D - 1; n >= order; n--) d[n] = (d[n] - d[n - 1]) / (x[n] - x[n - order]);
        for (int n = D - 1; n >= 0; n--) {
            for (int m = D - 1; m > 0; m--) powers[m] = powers[m - 1] - x[n] * powers[m];
            powers[0] = d[n] - x[n] * powers[0];
        }
        if (p == PIECES - 1) {
            double v = exact(part, 1e3, false) - exact(part, left + width, false), dv = -exact(part, left + width, true);
            powers[1] += 2 * (3 * v - dv * width) / (width * width);
            powers[2] += 3 * (dv * width - 2 * v) / (width * width * width);
        }
        int place = (p + 12) % PIECES;  // the exponent of floats in [1, 2) is 127, which ends in 11
        found.at[0][place] = exact(part, left, false);
        for (int n = 0; n < D; n++) found.at[n + 1][place] = powers[n] / (n + 1);
    }
    return found;
}

template <class T>
struct Tables {
    Polynomials of[B];
    Tables() {
        EACH(B, m)
            if constexpr (smooth(bases.at[m])) of[m] = fit<degree<T>(bases.at[m])>(bases.at[m]);
        END(B);
    }
};
template <class T>
const Tables<T> tables;

// The low four bits of `piece` number it, and the fifth, set in the first octave only, is turned where u > 0: of the two
// registers of Sides the first holds the pieces of the first octave of the right side and the others of the left one.
struct Place {
    Vec r;
    Int piece, side;
};
INLINE Place find(Vec u) {
    Vec a = (Vec)_mm512_min_ps((__m512)all(LAST), (__m512)magnitude(u));  // NaN stays NaN
    Int t = (Int)(a * (1 / UNIT) + 1.0f), piece = t >> 21;
    return {a - ((Vec)(t & ~0x1fffff) - 1.0f) * UNIT, piece, u > 0.0f ? piece ^ 16 : piece};
}
INLINE Vec coefficient(const Polynomials& p, int n, Place place) {
    return (Vec)_mm512_permutexvar_ps((__m512i)place.piece, (__m512)p.at[n]);
}
INLINE Vec coefficient(const Sides& p, int n, Place place) {
    return (Vec)_mm512_permutex2var_ps((__m512)p.at[n][0], (__m512i)place.side, (__m512)p.at[n][1]);
}
template <int D, class P>
INLINE Vec polynomial(const P& p, Place place) {
    Vec value = coefficient(p, D, place);
    EACH(D, n) value = value * place.r + coefficient(p, D - 1 - n, place); END(D);
    return value;
}
template <int D>
INLINE void polynomial(const Polynomials& p, Place place, Vec& value, Vec& slope) {
    slope = value = coefficient(p, D, place);
    EACH(D, n)
        if constexpr (n > 0) slope = slope * place.r + value;
        value = value * place.r + coefficient(p, D - 1 - n, place);
    END(D);
}

template <class T>
INLINE void parts(Vec u, Vec* value, Vec* slope) {
    Place place = find(u);
    EACH(B, m)
        constexpr Base part = bases.at[m];
        if constexpr (smooth(part)) polynomial<degree<T>(part)>(tables<T>.of[m], place, value[m], slope[m]);
    END(B);
}
#else
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

// -x · sigmoid(-z) and its slope in x, where z' = dz
INLINE void sigmoid_tail(Vec x, Vec z, Vec dz, Vec& value, Vec& slope) {
    Vec scale, rest;
    exponential(-z, scale, rest);
    Vec e = scale + rest, i = 1.0f / (1.0f + e), ei = e * i;
    value = -x * ei;
    slope = ei * (x * i * dz - 1.0f);
}

template <class T>
INLINE void parts(Vec u, Vec* value, Vec* slope) {
    Vec a = magnitude(u), x = at_most(a, 87.0f), scale, rest, m, e, i, ei;
    if constexpr (needed(silu_part) || needed(tanh_part) || needed(sigmoid_part)) {
        exponential(-x, scale, rest);
        m = rest + (scale - 1.0f), e = 1.0f + m, i = 1.0f / (1.0f + e), ei = e * i;
    }
    EACH(B, k)
        constexpr Base part = bases.at[k];
        Vec &v = value[k], &d = slope[k];
        if constexpr (part == silu_part) v = -x * ei, d = ei * (x * i - 1.0f);
        if constexpr (part == sigmoid_part) v = m * i * -0.5f, d = ei * i;
        if constexpr (part == tanh_part) {
            Vec j = 1.0f / (1.0f + e * e), ej = e * j;
            v = m * (-2.0f - m) * j, d = 4.0f * ej * ej;  // (1 - e²) / (1 + e²)
        }
        if constexpr (part == gelu_part) {
            // The normal density φ, and Φ(-y) = φ(y) · Mills' ratio, which is t · P(t) with t = 1 / (1 + 0.34 y): P is
            // our own minimax fit of Φ(-y), off by 2e-8, and in the tail by 9e-6 of the value.
            Vec y = at_most(a, 13.0f), power, more;
            exponential(y * y * -0.5f, power, more);
            Vec density = a > 13.0f ? all(0.0f) : (power + more) * 0.398942280f;  // below 8e-38
            Vec t = 1.0f / (y * 0.34f + 1.0f), tt = t * t;
            Vec p01 = t * 0.32620455f + 0.34086876f, p23 = t * -0.06935425f + 0.38859857f;
            Vec p45 = t * -0.49827540f + 0.65386304f;
            Vec tail = ((tt * 0.11140884f + p45) * (tt * tt) + (tt * p23 + p01)) * t * density;
            v = -y * tail, d = y * density - tail;
        }
        if constexpr (part == gelu_tanh_part) {
            Vec y = at_most(a, 10.0f), yy = y * y;
            sigmoid_tail(y, y * (yy * 0.0713548163f + 1.59576912f), yy * 0.214064449f + 1.59576912f, v, d);
        }
        if constexpr (part == quick_gelu_part) {
            Vec y = at_most(a, 50.0f);
            sigmoid_tail(y, 1.702f * y, all(1.702f), v, d);
        }
    END(B);
}
#endif

// --- the bases -------------------------------------------------------------------------------------------------------

struct Point {
    Vec value[B], slope[B];
};

INLINE Vec signed_as(Vec u, Vec v) { return u > 0.0f ? v : -v; }

// The straight bases and the square. Infinite u gives the limits.
INLINE void corners(Vec u, Point& p) {
    Vec up = u < 0.0f ? all(0.0f) : u;  // NaN stays NaN
    EACH(B, m)
        constexpr Base base = bases.at[m];
        if constexpr (base == constant) p.value[m] = all(1.0f), p.slope[m] = all(0.0f);
        if constexpr (base == line) p.value[m] = u, p.slope[m] = all(1.0f);
        if constexpr (base == ramp) p.value[m] = up, p.slope[m] = u > 0.0f ? all(1.0f) : all(0.0f);
        if constexpr (base == square) p.value[m] = up * up, p.slope[m] = up + up;
    END(B);
}

template <class T>
INLINE Point evaluate(Vec u) {
    Point p;
    corners(u, p);
    parts<T>(u, p.value, p.slope);
    EACH(B, m)
        if constexpr (smooth(bases.at[m])) {
            Vec& turned = odd(bases.at[m]) ? p.value[m] : p.slope[m];
            turned = signed_as(u, turned);
        }
    END(B);
    return p;
}

// --- memory: float and bfloat16 (as its 16 bits), whole vectors and the last, shorter one ----------------------------

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
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#else
    return (Vec)(__builtin_convertvector(half, Bits) << 16);
#endif
}
INLINE void write(float* p, Vec v, int n) {
    if (n == LANES) std::memcpy(p, &v, sizeof v);
    else std::memcpy(p, &v, 4 * n);
}
INLINE void write(uint16_t* p, Vec v, int n) {
#if defined(__AVX512BF16__)
    Half half = (Half)_mm512_cvtneps_pbh((__m512)v);
#else
    Bits bits = (Bits)v;
    bits = bits + 0x7fff + ((bits >> 16) & 1);  // to the nearest, ties to even
    bits = v != v ? Bits{} + 0x7fc00000u : bits;
    Half half = __builtin_convertvector(bits >> 16, Half);
#endif
    if (n == LANES) std::memcpy(p, &half, sizeof half);
    else std::memcpy(p, &half, 2 * n);
}
INLINE float total(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
#endif
}

// --- one row: a token ------------------------------------------------------------------------------------------------

template <bool careful>
INLINE Vec times(float s, Vec v) {
    if constexpr (careful) return s == 0.0f ? all(0.0f) : s * v;
    return s * v;
}

template <bool careful>
INLINE Vec sum(const float* s, const Vec* v) {
    Vec out{};
    EACH(B, m) out += times<careful>(s[m], v[m]); END(B);
    return out;
}

template <bool careful>
INLINE Vec sum_pairs(const float* s, const Vec* first, const Vec* second) {
    Vec out{};
    EACH(B, m)
        if constexpr (careful) EACH(B, l) out += times<true>(s[m * B + l], first[m] * second[l]); END(B);
        else out += first[m] * sum<false>(s + m * B, second);
    END(B);
    return out;
}

// Coefficients of the entries -> of the bases
INLINE void to_bases(const float* c, float* s) {
    for (int m = 0; m < B; m++) s[m] = 0.0f;
    EACH(K, k)
        constexpr Entry entry = entries[k];
        const float ck = c[k];
        EACH(B, m) if constexpr (share(entry, bases.at[m]) != 0.0f) s[m] += share(entry, bases.at[m]) * ck; END(B);
    END(K);
}
// and gradients of those of the bases -> of the entries
INLINE void to_entries(const float* ds, float* dc) {
    EACH(K, k)
        constexpr Entry entry = entries[k];
        float sum = 0;
        EACH(B, m) if constexpr (share(entry, bases.at[m]) != 0.0f) sum += share(entry, bases.at[m]) * ds[m]; END(B);
        dc[k] = sum;
    END(K);
}
void to_bases_of_pairs(const float* c, float* s) {
    float half[B][K], column[K];
    for (int l = 0; l < K; l++) {
        float out[B];
        for (int k = 0; k < K; k++) column[k] = c[k * K + l];
        to_bases(column, out);
        for (int m = 0; m < B; m++) half[m][l] = out[m];
    }
    for (int m = 0; m < B; m++) to_bases(half[m], s + m * B);
}
void to_entries_of_pairs(const float* ds, float* dc) {
    float half[K][B], column[B];
    for (int l = 0; l < B; l++) {
        float out[K];
        for (int m = 0; m < B; m++) column[m] = ds[m * B + l];
        to_entries(column, out);
        for (int k = 0; k < K; k++) half[k][l] = out[k];
    }
    for (int k = 0; k < K; k++) to_entries(half[k], dc + k * K);
}

// The mix of a row (not of pairs), or its slope: with AVX-512 one polynomial for each piece of either side of 0, but for
// the straight bases' values and the square.
template <class T, bool of_slope>
struct Mix {
    const float* s;
#if defined(__AVX512F__)
    static constexpr int D = highest<T>() > 0 ? highest<T>() - of_slope : 0;
    Sides sides;
#endif

    INLINE explicit Mix(const float* s) : s(s) {
#if defined(__AVX512F__)
        Polynomials same{}, turned{};  // on the left side
        EACH(B, m)
            constexpr Base base = bases.at[m];
            if constexpr (smooth(base)) {
                auto& sum = odd(base) != of_slope ? turned : same;  // the slope of an odd part is even
                for (int n = of_slope; n <= degree<T>(base); n++)
                    sum.at[n - of_slope] += (of_slope ? n * s[m] : s[m]) * tables<T>.of[m].at[n];
            }
            if constexpr (of_slope && base == line) same.at[0] += s[m];
        END(B);
        Vec right{};  // 1 where the first register holds the right side
        for (int p = 12; p < PIECES; p++) right[p] = 1.0f;
        for (int n = 0; n <= D; n++) {
            Vec added = (right + right - 1.0f) * turned.at[n];
            sides.at[n][0] = same.at[n] + added, sides.at[n][1] = same.at[n] - added;
        }
        EACH(B, m)
            if constexpr (of_slope && bases.at[m] == ramp)
                sides.at[0][0] += s[m] * right, sides.at[0][1] += s[m] * (1.0f - right);
        END(B);
#endif
    }

    template <bool careful>
    INLINE Vec at(Vec u) const {
#if defined(__AVX512F__)
        if constexpr (!careful) {
            Point p;
            corners(u, p);
            Vec out = polynomial<D>(sides, find(u));
            EACH(B, m)
                constexpr Base base = bases.at[m];
                if constexpr (of_slope && base == square) out += s[m] * p.slope[m];
                if constexpr (!of_slope && !smooth(base)) out += s[m] * p.value[m];
            END(B);
            return out;
        }
#endif
        Point p = evaluate<T>(u);
        return sum<careful>(s, of_slope ? p.slope : p.value);
    }
};

template <bool careful, class T>
bool forward_row(const T* a, const T* b, const float* c, const float* e, T* y, int64_t h) {
    float s[S], t[B];
    if constexpr (form == pairs) to_bases_of_pairs(c, s);
    else to_bases(c, s);
    if constexpr (form == both) to_bases(e, t);
    const Mix<T, false> first(s), second(form == both ? t : s);
    Vec spoilt{};
    auto step = [&](int64_t j, int n) __attribute__((always_inline)) {
        Vec out;
        if constexpr (form == pairs) {
            out = sum_pairs<careful>(s, evaluate<T>(read(a + j, n)).value, evaluate<T>(read(b + j, n)).value);
        } else {
            out = first.template at<careful>(read(a + j, n));
            if constexpr (form == one) out *= read(b + j, n);
            if constexpr (form == both) out *= second.template at<careful>(read(b + j, n));
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
    float s[S], t[B];
    if constexpr (form == pairs) to_bases_of_pairs(c, s);
    else to_bases(c, s);
    if constexpr (form == both) to_bases(e, t);
    const Mix<T, true> first_slope(s), second_slope(form == both ? t : s);
    Vec sums[S]{}, other_sums[B]{}, spoilt{};
    auto step = [&](int64_t j, int n) __attribute__((always_inline)) {
        Vec grad = read(g + j, n), u = read(a + j, n), slope, other_slope{};
        Point first = evaluate<T>(u);
        if constexpr (form == plain) {
            EACH(B, m) sums[m] += grad * first.value[m]; END(B);
            slope = grad * first_slope.template at<careful>(u);
        } else if constexpr (form == pairs) {
            Point second = evaluate<T>(read(b + j, n));
            EACH(B, m)
                Vec weighted = grad * first.value[m];
                EACH(B, l) sums[m * B + l] += weighted * second.value[l]; END(B);
            END(B);
            slope = grad * sum_pairs<careful>(s, first.slope, second.value);
            other_slope = grad * sum_pairs<careful>(s, first.value, second.slope);
        } else {
            Vec other = read(b + j, n), mixed = sum<careful>(s, first.value);
            if constexpr (form == both) {
                Point second = evaluate<T>(other);
                Vec weighted = grad * mixed;
                EACH(B, m) other_sums[m] += weighted * second.value[m]; END(B);
                other_slope = weighted * second_slope.template at<careful>(other);
                other = sum<careful>(t, second.value);
            } else {
                other_slope = grad * mixed;
            }
            Vec weighted = grad * other;
            EACH(B, m) sums[m] += weighted * first.value[m]; END(B);
            slope = weighted * first_slope.template at<careful>(u);
        }
        if constexpr (!careful) spoilt += (slope + other_slope) * 0.0f;
        write(da + j, slope, n);
        if constexpr (form != plain) write(db + j, other_slope, n);
    };
    int64_t j = 0;
    for (; j + LANES <= h; j += LANES) step(j, LANES);
    if (j < h) step(j, h - j);
    if (total(spoilt) != 0.0f) return false;
    float ds[S], other_ds[B];
    for (int m = 0; m < S; m++) ds[m] = total(sums[m]);
    if constexpr (form == pairs) to_entries_of_pairs(ds, dc);
    else to_entries(ds, dc);
    if constexpr (form == both) {
        for (int m = 0; m < B; m++) other_ds[m] = total(other_sums[m]);
        to_entries(other_ds, de);
    }
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
