/* What files want of C: copies from a mapping of a file that may be cut meanwhile, sums of what is copied, and turns of an
 * io_uring queue.
 *
 * No Python API: called through ctypes, which lets go of the interpreter lock. Optional: where there was no compiler
 * when xferd was built, mapping.py and engines.py have slower ways.
 */
#define _GNU_SOURCE
#include "../local/_pieces.c"
#include "_xxh3.c"

#include <errno.h>
#include <linux/io_uring.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- sums of blocks ---------------------------------------------------------------------------------------------- */

/* Blocks of a stream of bytes, ascending and apart from each other, and where their sums go. */
struct summing {
    uint64_t (*whole)(const void *, size_t); /* xxh3 of a library that xxh3.py has found */
    const uint64_t *begin;
    const uint64_t *stop;
    size_t count;
    uint64_t *sums;
};

/* Where the sums of a stream of bytes have got to. */
struct passing {
    const struct summing *wanted;
    uint64_t at;
    size_t block;
    struct sum sum;
};

/* Return how many of the next bytes are all of one block, or of none. */
static size_t next_part(const struct passing *passing, size_t size)
{
    const struct summing *wanted = passing->wanted;
    uint64_t border;

    if (passing->block == wanted->count)
        return size;
    border = wanted->begin[passing->block];
    if (passing->at >= border)
        border = wanted->stop[passing->block];
    return size < border - passing->at ? size : border - passing->at;
}

/* Sum the next bytes of the stream, as many as ``next_part`` allows, as far as they are of a block; copy them unless ``to``
 * is NULL. */
static void pass_part(struct passing *passing, const char *from, char *to, size_t part, int past_cache)
{
    const struct summing *wanted = passing->wanted;
    uint64_t begin = passing->block < wanted->count ? wanted->begin[passing->block] : UINT64_MAX;

    if (passing->at < begin) {
        if (to && past_cache)
            copy_past_cache(to, from, part);
        else if (to)
            memcpy(to, from, part);
    } else {
        uint64_t stop = wanted->stop[passing->block];

        if (!to && part == stop - begin)
            wanted->sums[passing->block++] = wanted->whole(from, part);
        else {
            if (passing->at == begin)
                sum_begin(&passing->sum);
            sum_take(&passing->sum, from, to, part, past_cache);
            if (passing->at + part == stop)
                wanted->sums[passing->block++] = sum_end(&passing->sum, wanted->whole);
        }
    }
    passing->at += part;
}

/* Sum the next bytes of the stream, as far as they are of blocks. */
static void pass(struct passing *passing, const char *data, size_t size)
{
    while (size) {
        size_t part = next_part(passing, size);

        pass_part(passing, data, NULL, part, 0);
        data += part;
        size -= part;
    }
}

/* Sum blocks of the stream that rows of memory make up, which reach to the end of the last one at least. Returns 0. */
int xferd_sum_pieces(const struct summing *wanted, const struct iovec *row)
{
    struct passing passing = {.wanted = wanted};

    for (; passing.block < wanted->count; row++)
        pass(&passing, row->iov_base, row->iov_len);
    return 0;
}

/* As xferd_copy_pieces, and sum blocks of what is copied on the way. */
static void copy_summing(const struct iovec *target, const struct iovec *source, size_t sources, int past_cache,
                         const struct summing *wanted)
{
    struct passing passing = {.wanted = wanted};
    size_t filled = 0;

    for (const struct iovec *end = source + sources; source < end; source++) {
        const char *from = source->iov_base;
        size_t left = source->iov_len;

        while (left) {
            size_t room = target->iov_len - filled;
            size_t size = next_part(&passing, left < room ? left : room);
            char *to = (char *)target->iov_base + filled;

            pass_part(&passing, from, to, size, past_cache && size >= PAST_CACHE_MIN);
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

/* ---- copies that survive SIGBUS ---------------------------------------------------------------------------------- */

/* Where this thread goes on when a page cannot be had; NULL outside of a copy. initial-exec: a handler must not allocate. */
static __thread sigjmp_buf *volatile way_back __attribute__((tls_model("initial-exec")));
static struct sigaction before;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (way_back)
        siglongjmp(*way_back, 1);
    /* Not ours. The instruction is done again when this returns, and then meets whoever was here before. */
    sigaction(number, &before, NULL);
    if (info->si_code <= 0)
        raise(number); /* sent by a process: it would not come again */
}

static int is_guarded(void)
{
    struct sigaction now;

    return !sigaction(SIGBUS, NULL, &now) && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error;
}

/* Take SIGBUS over, for the process. Not thread-safe; returns 0, or -1. Again is fine. */
int xferd_guard(void)
{
    struct sigaction ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};

    if (is_guarded())
        return 0;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, NULL, &before) || sigaction(SIGBUS, &ours, NULL) ? -1 : 0;
}

/* As copy_summing, or as xferd_copy_pieces where nothing is wanted; returns -1 where a page could not be had (some bytes
 * have been copied then), or where somebody else has taken SIGBUS (none have). A jump leaves a sum half done, which is on
 * the stack and goes with it. */
static int copy_guarded(const struct iovec *target, const struct iovec *source, size_t sources, int past_cache,
                        const struct summing *wanted)
{
    sigjmp_buf here;

    if (!is_guarded())
        return -1;
    if (sigsetjmp(here, 0)) { /* without the mask, which SA_NODEFER has left as it was */
        way_back = NULL;
        return -1;
    }
    way_back = &here;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    if (wanted)
        copy_summing(target, source, sources, past_cache, wanted);
    else
        xferd_copy_pieces(target, source, sources, past_cache);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    way_back = NULL;
    return 0;
}

#ifndef SYS_cachestat
#define SYS_cachestat 451 /* the same on every architecture; Linux 6.5 */
#endif

/* Return whether some spans of a file, each one as (position, bytes), are in the page cache as a whole. */
static int is_cached(int fd, const struct iovec *spans, size_t count, size_t probes)
{
    uint64_t page = sysconf(_SC_PAGESIZE);

    if (count < probes)
        probes = count;
    for (size_t number = 0; number < probes; number++) {
        const struct iovec *span = &spans[probes > 1 ? number * (count - 1) / (probes - 1) : 0];
        uint64_t start = (uint64_t)span->iov_base, end = start + span->iov_len;
        uint64_t range[2] = {start, span->iov_len}, found[5];

        if (syscall(SYS_cachestat, fd, range, found, 0))
            return 0; /* an older kernel, or not ours to know */
        if (found[0] < (end + page - 1) / page - start / page)
            return 0;
    }
    return 1;
}

/* Read spans of a file, each one as (position, bytes), from its mapping at base into target, of the same total; source is
 * room for a copy of the spans; wanted is NULL, or what is to be summed of the stream that they make up. Returns 0, or -1
 * where calls have to read all of it again: some of it is not in the page cache, or the file ends before ``end``, or a page
 * could not be had. */
int xferd_read_mapped(int fd, uint64_t base, const struct iovec *spans, size_t count, uint64_t end, size_t probes,
                      struct iovec *source, const struct iovec *target, int past_cache,
                      const struct summing *wanted)
{
    struct stat facts;

    if (!is_cached(fd, spans, count, probes))
        return -1;
    for (size_t row = 0; row < count; row++) {
        source[row].iov_base = (char *)spans[row].iov_base + base;
        source[row].iov_len = spans[row].iov_len;
    }
    if (copy_guarded(target, source, count, past_cache, wanted))
        return -1;
    /* What lies after the end of a file that was cut within a page reads as zeros. */
    return fstat(fd, &facts) || (uint64_t)facts.st_size < end ? -1 : 0;
}

/* ---- writes that are summed -------------------------------------------------------------------------------------- */

/* Bytes that one call writes: they stay in a cache between their sum and the call. Measured by 128 MiB of two threads to one
 * file, by the speed without sums: 64 KiB 0.73, 128 KiB 0.78, 256 KiB 0.80, 512 KiB 0.90, 1 MiB 0.97: calls take turns. */
#define WRITTEN (1 << 20)
#define WRITTEN_ROWS 256

/* Write memory to spans of a file, each one as (position, bytes), of the same total, in order, and sum blocks of it just
 * before they are written. Returns 0, or -1 where a call did not write all that it was to, or *stop was set: some of it has
 * been written then, and no sum means anything. */
int xferd_write_summing(int fd, const struct iovec *spans, size_t count, const struct iovec *memory,
                        const struct summing *wanted, const volatile int *stop)
{
    struct passing passing = {.wanted = wanted};
    size_t used = 0; /* of the row of memory at hand */
    int code = 0;

    for (const struct iovec *span = spans; !code && span < spans + count; span++) {
        uint64_t position = (uint64_t)span->iov_base, end = position + span->iov_len;

        while (!code && position < end) {
            struct iovec rows[WRITTEN_ROWS];
            size_t room = end - position < WRITTEN ? end - position : WRITTEN, filled = 0;
            int number = 0;

            while (filled < room && number < WRITTEN_ROWS) {
                size_t left = memory->iov_len - used, part = left < room - filled ? left : room - filled;

                rows[number].iov_base = (char *)memory->iov_base + used;
                rows[number].iov_len = part;
                pass(&passing, rows[number++].iov_base, part);
                filled += part;
                if ((used += part) == memory->iov_len) {
                    memory++;
                    used = 0;
                }
            }
            code = *stop || pwritev(fd, rows, number, position) != (ssize_t)filled ? -1 : 0;
            position += filled;
        }
    }
    return code;
}

/* ---- io_uring ---------------------------------------------------------------------------------------------------- */

/* A ring as ring.py has mapped it. Its thread's own system calls alone change the kernel's side (DEFER_TASKRUN), so that
 * plain loads and stores do. */
struct queue {
    int fd;
    unsigned depth;
    unsigned entries;     /* of the submission queue: a power of two */
    unsigned completions; /* of the completion queue: a power of two */
    unsigned *sq_tail;
    struct io_uring_sqe *requests;
    unsigned *cq_head;
    unsigned *cq_tail;
    struct io_uring_cqe *completed;
};

static int is_failure(int result)
{
    return result < 0 && result != -EINTR && result != -EAGAIN;
}

/* Perform requests, up to the ring's depth at a time, waiting for at least a batch of them each time; put each result at
 * its request's token. Begins none after a failure, or once *stop is set. Returns 0 when nothing is under way any more,
 * or the errno of a ring that the kernel refuses; *under_way tells how many it has left. */
int xferd_run_ring(struct queue *ring, const struct io_uring_sqe *requests, size_t count, int *results,
                   unsigned batch, const volatile int *stop, unsigned *under_way)
{
    size_t sent = 0, done = 0;
    unsigned tail = *ring->sq_tail, unsubmitted = 0;
    int halted = 0;

    for (;;) {
        halted |= *stop;
        while (!halted && sent < count && sent - done < ring->depth) {
            ring->requests[tail++ & (ring->entries - 1)] = requests[sent++];
            unsubmitted++;
        }
        __atomic_store_n(ring->sq_tail, tail, __ATOMIC_RELEASE);
        if (sent == done)
            return *under_way = 0;

        unsigned left = sent - done;
        unsigned wanted = halted || sent == count || left < batch ? left : batch;
        long code = syscall(SYS_io_uring_enter, ring->fd, unsubmitted, wanted, IORING_ENTER_GETEVENTS, NULL, 0);

        if (code >= 0)
            unsubmitted -= code;
        else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) {
            *under_way = left;
            return errno;
        }

        unsigned head = *ring->cq_head, end = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);

        for (; head != end; head++, done++) {
            const struct io_uring_cqe *one = &ring->completed[head & (ring->completions - 1)];

            results[one->user_data] = one->res;
            halted |= is_failure(one->res);
        }
        __atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
    }
}
