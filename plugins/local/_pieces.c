/* Copy between two tables of spans of this process's memory: one loop, which no system call and no function of Python or
 * numpy does for spans that are scattered on both sides.
 *
 * No Python API: called through ctypes, which lets go of the interpreter lock. Optional: where there was no compiler
 * when xferd was built, plugins/local/mapped.py has slower ways. Totals are equal; rows need not pair up.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

/* Shorter pieces gain nothing: a row of 512 bytes has too few lines for the stores to run ahead. */
#define PAST_CACHE_MIN 2048

#ifdef __SSE2__
#include <emmintrin.h>

/* Stores that go around the cache, as a target of more than the cache's size would leave it again anyway: its lines are
 * not read first, which is a third of the traffic. Every x86-64 has them. */
static void copy_past_cache(char *to, const char *from, size_t size)
{
    size_t head = -(uintptr_t)to & 63;

    if (size < head + 64) {
        memcpy(to, from, size);
        return;
    }
    memcpy(to, from, head);
    for (to += head, from += head, size -= head; size >= 64; to += 64, from += 64, size -= 64) {
        __m128i a = _mm_loadu_si128((const __m128i *)from);
        __m128i b = _mm_loadu_si128((const __m128i *)(from + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(from + 32));
        __m128i d = _mm_loadu_si128((const __m128i *)(from + 48));

        _mm_stream_si128((__m128i *)to, a);
        _mm_stream_si128((__m128i *)(to + 16), b);
        _mm_stream_si128((__m128i *)(to + 32), c);
        _mm_stream_si128((__m128i *)(to + 48), d);
    }
    memcpy(to, from, size);
}

static void finish(void)
{
    _mm_sfence(); /* or another core might see "done" before the bytes */
}
#else
static void copy_past_cache(char *to, const char *from, size_t size)
{
    memcpy(to, from, size);
}

static void finish(void)
{
}
#endif

void xferd_copy_pieces(const struct iovec *target, const struct iovec *source, size_t sources, int past_cache)
{
    size_t filled = 0; /* bytes of the target row at hand */

    for (const struct iovec *end = source + sources; source < end; source++) {
        const char *from = source->iov_base;
        size_t left = source->iov_len;

        while (left) {
            size_t room = target->iov_len - filled;
            size_t size = left < room ? left : room;
            char *to = (char *)target->iov_base + filled;

            if (past_cache && size >= PAST_CACHE_MIN)
                copy_past_cache(to, from, size);
            else
                memcpy(to, from, size);
            from += size;
            left -= size;
            filled += size;
            if (filled == target->iov_len) {
                target++;
                filled = 0;
            }
        }
    }
    if (past_cache)
        finish();
}
