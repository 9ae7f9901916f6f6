/* Sums of bytes while they are copied: xxh3 with 64 bits and no seed, as its specification describes it for inputs of more
 * than 240 bytes (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md). Shorter ones are left to the library.
 *
 * The library sums as fast, but only bytes that are in place. To copy some and then have them summed leaves memory idle
 * meanwhile; in one loop the sums hide behind it.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define STRIPE 64
#define UNIT 1024 /* 16 stripes: the secret is used up, and the lanes are scrambled */
#define LINE 64

#define PRIME32_1 0x9E3779B1U
#define PRIME32_2 0x85EBCA77U
#define PRIME32_3 0xC2B2AE3DU
#define PRIME64_1 0x9E3779B185EBCA87ULL
#define PRIME64_2 0xC2B2AE3D27D4EB4FULL
#define PRIME64_3 0x165667B19E3779F9ULL
#define PRIME64_4 0x85EBCA77C2B2AE63ULL
#define PRIME64_5 0x27D4EB2F165667C5ULL
#define PRIME_MX1 0x165667919E3779F9ULL

static const unsigned char secret[192] __attribute__((aligned(LINE))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

/* The sum of a stream of bytes, as far as it has come. What is kept waits: of the last bytes a stripe is summed that ends
 * with the stream, and may begin with bytes before those that are kept. */
struct sum {
    uint64_t lanes[8];
    uint64_t nbytes;
    size_t held;
    char kept[STRIPE + UNIT] __attribute__((aligned(LINE)));
};

static void sum_begin(struct sum *sum)
{
    static const uint64_t lanes[8] = {
        PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1,
    };

    memcpy(sum->lanes, lanes, sizeof lanes);
    sum->nbytes = sum->held = 0;
}

static uint64_t load(const void *from)
{
    uint64_t value;

    memcpy(&value, from, sizeof value);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

static void add_stripe(uint64_t *lanes, const char *stripe, const unsigned char *key)
{
    for (int lane = 0; lane < 8; lane++) {
        uint64_t value = load(stripe + 8 * lane), keyed = value ^ load(key + 8 * lane);

        lanes[lane ^ 1] += value;
        lanes[lane] += (uint32_t)keyed * (keyed >> 32);
    }
}

/* Sum whole units, and copy them unless ``to`` is NULL. Each byte is loaded once: what is summed is what was stored, whatever
 * happens to the page that it came from; the empty statements keep a compiler from loading it again. ``last`` is given the
 * last stripe. There is at least one unit. */
typedef void sum_units(uint64_t *lanes, const char *from, char *to, size_t units, int past_cache, char *last);

static void sum_units_anywhere(uint64_t *lanes, const char *from, char *to, size_t units, int past_cache, char *last)
{
    (void)past_cache;
    for (; units; units--) {
        for (int number = 0; number < UNIT / STRIPE; number++, from += STRIPE) {
            memcpy(last, from, STRIPE);
            __asm__ volatile("" : : "r"(last) : "memory");
            if (to) {
                memcpy(to, last, STRIPE);
                to += STRIPE;
            }
            add_stripe(lanes, last, secret + 8 * number);
        }
        for (int lane = 0; lane < 8; lane++) {
            uint64_t value = lanes[lane];

            lanes[lane] = (value ^ value >> 47 ^ load(secret + sizeof secret - STRIPE + 8 * lane)) * PRIME32_1;
        }
    }
}

#if defined(__x86_64__) && !defined(XFERD_ANY_PROCESSOR)
#include <immintrin.h>

#define WIDE __attribute__((target("avx2")))

static inline WIDE __m256i wide_key(size_t at)
{
    return _mm256_loadu_si256((const __m256i *)(secret + at));
}

static inline WIDE __m256i wide_add(__m256i lanes, __m256i value, __m256i key)
{
    __m256i keyed = _mm256_xor_si256(value, key);
    __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));

    return _mm256_add_epi64(lanes, _mm256_add_epi64(product, _mm256_shuffle_epi32(value, 0x4e)));
}

static inline WIDE __m256i wide_scramble(__m256i lanes, __m256i key)
{
    __m256i prime = _mm256_set1_epi64x(PRIME32_1);
    __m256i value = _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), key);
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(value, 32), prime);

    return _mm256_add_epi64(_mm256_mul_epu32(value, prime), _mm256_slli_epi64(high, 32));
}

static WIDE void sum_units_wide(uint64_t *lanes, const char *from, char *to, size_t units, int past_cache, char *last)
{
    __m256i *low = (__m256i *)lanes, *high = low + 1;
    __m256i a = _mm256_loadu_si256(low), b = _mm256_loadu_si256(high), c = a, d = b;

    for (; units; units--) {
        for (int number = 0; number < UNIT / STRIPE; number++, from += STRIPE) {
            c = _mm256_loadu_si256((const __m256i *)from);
            d = _mm256_loadu_si256((const __m256i *)(from + 32));
            __asm__ volatile("" : "+x"(c), "+x"(d));
            if (to && past_cache) {
                _mm256_stream_si256((__m256i *)to, c);
                _mm256_stream_si256((__m256i *)(to + 32), d);
                to += STRIPE;
            } else if (to) {
                _mm256_storeu_si256((__m256i *)to, c);
                _mm256_storeu_si256((__m256i *)(to + 32), d);
                to += STRIPE;
            }
            a = wide_add(a, c, wide_key(8 * number));
            b = wide_add(b, d, wide_key(8 * number + 32));
        }
        a = wide_scramble(a, wide_key(sizeof secret - STRIPE));
        b = wide_scramble(b, wide_key(sizeof secret - STRIPE + 32));
    }
    _mm256_storeu_si256(low, a);
    _mm256_storeu_si256(high, b);
    _mm256_storeu_si256((__m256i *)last, c);
    _mm256_storeu_si256((__m256i *)(last + 32), d);
}

static sum_units *best_units(void)
{
    return __builtin_cpu_supports("avx2") ? sum_units_wide : sum_units_anywhere;
}
#else
static sum_units *best_units(void)
{
    return sum_units_anywhere;
}
#endif

/* Stores that go around the cache want whole lines; where the target's begin elsewhere, units are laid aside and copied from
 * there, so that each line but the first and the last of them is stored at once. */
static void sum_copying(struct sum *sum, const char *from, char *to, size_t units, int past_cache)
{
    char aside[4 * UNIT] __attribute__((aligned(LINE)));
    sum_units *run = best_units();

    if (!past_cache || (uintptr_t)to % LINE == 0) {
        run(sum->lanes, from, to, units, past_cache, sum->kept);
        return;
    }
    while (units) {
        size_t some = units < sizeof aside / UNIT ? units : sizeof aside / UNIT;

        run(sum->lanes, from, aside, some, 0, sum->kept);
        copy_past_cache(to, aside, some * UNIT);
        from += some * UNIT;
        to += some * UNIT;
        units -= some;
    }
}

/* Sum the next bytes, and copy them unless ``to`` is NULL. */
static void sum_take(struct sum *sum, const char *from, char *to, size_t size, int past_cache)
{
    sum->nbytes += size;
    while (size) {
        char *kept = sum->kept + STRIPE;
        size_t part;

        if (sum->held == UNIT) { /* more comes, so that it may go */
            best_units()(sum->lanes, kept, NULL, 1, 0, sum->kept);
            sum->held = 0;
        }
        if (!sum->held && size > UNIT) {
            part = (size - 1) / UNIT * UNIT;
            sum_copying(sum, from, to, part / UNIT, past_cache);
        } else {
            part = size < UNIT - sum->held ? size : UNIT - sum->held;
            kept += sum->held;
            memcpy(kept, from, part);
            __asm__ volatile("" : : "r"(kept) : "memory");
            if (to && past_cache)
                copy_past_cache(to, kept, part);
            else if (to)
                memcpy(to, kept, part);
            sum->held += part;
        }
        from += part;
        size -= part;
        if (to)
            to += part;
    }
}

static uint64_t fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;

    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Return the sum of all that was taken; ``whole`` is the library's, for what is short. */
static uint64_t sum_end(struct sum *sum, uint64_t (*whole)(const void *, size_t))
{
    const char *kept = sum->kept + STRIPE;
    uint64_t value = sum->nbytes * PRIME64_1;

    if (sum->nbytes <= UNIT)
        return whole(kept, sum->held);
    for (size_t number = 0; number < (sum->held - 1) / STRIPE; number++)
        add_stripe(sum->lanes, kept + number * STRIPE, secret + 8 * number);
    add_stripe(sum->lanes, kept + sum->held - STRIPE, secret + sizeof secret - STRIPE - 7);
    for (int pair = 0; pair < 4; pair++) {
        const unsigned char *key = secret + 11 + 16 * pair;

        value += fold(sum->lanes[2 * pair] ^ load(key), sum->lanes[2 * pair + 1] ^ load(key + 8));
    }
    value = (value ^ value >> 37) * PRIME_MX1;
    return value ^ value >> 32;
}
