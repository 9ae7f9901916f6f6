/* Moves many pieces of memory at once: GPU memory and locked host memory, in any mixture and of any alignment.
 *
 * A warp takes a tile of one piece at a time. Stores are 16 bytes wide and aligned; bytes before the first and after the
 * last of them go one by one. Where source and target do not agree modulo 16, two aligned loads are put together for
 * each store. No load touches a 16-byte granule of which no byte is wanted, so none leaves the memory that a piece is in.
 *
 * Compiled at run time (kernel.py). UNROLL is how many loads a lane has under way.
 */
typedef unsigned long long u64;

struct Piece {
    u64 source, target, nbytes;
};

#ifndef UNROLL
#define UNROLL 4
#endif
#define SHIFTED_UNROLL ((UNROLL + 1) / 2) /* two loads each */
#define LANES 32u

#ifdef STREAMING
#define LOAD(at) __ldcs(at)
#define STORE(at, value) __stcs(at, value)
#else
#define LOAD(at) (*(at))
#define STORE(at, value) (*(at) = (value))
#endif

static __device__ __forceinline__ void copy_aligned(u64 source, u64 target, u64 count, unsigned lane)
{
    const uint4 *from = (const uint4 *)source;
    uint4 *to = (uint4 *)target;
    u64 i = lane;

    for (; i + LANES * (UNROLL - 1) < count; i += LANES * UNROLL) {
        uint4 held[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; k++)
            held[k] = LOAD(from + i + LANES * k);
#pragma unroll
        for (int k = 0; k < UNROLL; k++)
            STORE(to + i + LANES * k, held[k]);
    }
    for (; i < count; i += LANES)
        STORE(to + i, LOAD(from + i));
}

/* 16 bytes that begin ``word`` words and ``bits`` bits into two neighbouring granules. */
static __device__ __forceinline__ uint4 straddle(uint4 a, uint4 b, unsigned word, unsigned bits)
{
    unsigned v, w, x, y, z;
    uint4 made;

    switch (word) {
    case 0: v = a.x, w = a.y, x = a.z, y = a.w, z = b.x; break;
    case 1: v = a.y, w = a.z, x = a.w, y = b.x, z = b.y; break;
    case 2: v = a.z, w = a.w, x = b.x, y = b.y, z = b.z; break;
    default: v = a.w, w = b.x, x = b.y, y = b.z, z = b.w; break;
    }
    made.x = __funnelshift_r(v, w, bits);
    made.y = __funnelshift_r(w, x, bits);
    made.z = __funnelshift_r(x, y, bits);
    made.w = __funnelshift_r(y, z, bits);
    return made;
}

static __device__ __forceinline__ void copy_shifted(u64 source, u64 target, u64 count, unsigned lane)
{
    const uint4 *from = (const uint4 *)(source & ~15ull);
    uint4 *to = (uint4 *)target;
    const unsigned word = (unsigned)(source & 15) >> 2, bits = ((unsigned)source & 3) * 8;
    u64 i = lane;

    for (; i + LANES * (SHIFTED_UNROLL - 1) < count; i += LANES * SHIFTED_UNROLL) {
        uint4 held[SHIFTED_UNROLL];
#pragma unroll
        for (int k = 0; k < SHIFTED_UNROLL; k++)
            held[k] = straddle(LOAD(from + i + LANES * k), LOAD(from + i + LANES * k + 1), word, bits);
#pragma unroll
        for (int k = 0; k < SHIFTED_UNROLL; k++)
            STORE(to + i + LANES * k, held[k]);
    }
    for (; i < count; i += LANES)
        STORE(to + i, straddle(LOAD(from + i), LOAD(from + i + 1), word, bits));
}

static __device__ void copy_span(u64 source, u64 target, u64 nbytes, unsigned lane)
{
    u64 head = (0 - target) & 15, count;

    head = head < nbytes ? head : nbytes;
    if (lane < head)
        ((char *)target)[lane] = ((const char *)source)[lane];
    source += head, target += head, nbytes -= head;
    count = nbytes >> 4;
    if (source & 15)
        copy_shifted(source, target, count, lane);
    else
        copy_aligned(source, target, count, lane);
    if (lane < (nbytes & 15))
        ((char *)target)[(count << 4) + lane] = ((const char *)source)[(count << 4) + lane];
}

/* ``work`` is pieces times ``tiles``; a piece has at most so many tiles, and may have fewer. Tiles end where the target is
 * aligned, so that only a piece's own ends are odd. */
extern "C" __global__ void __launch_bounds__(256)
xferd_copy_pieces(const struct Piece *pieces, unsigned work, unsigned tiles, unsigned tile_nbytes)
{
    const unsigned lane = threadIdx.x % LANES, warps = blockDim.x / LANES;

    for (unsigned item = blockIdx.x * warps + threadIdx.x / LANES; item < work; item += gridDim.x * warps) {
        const unsigned number = tiles == 1 ? item : item / tiles;
        const unsigned tile = item - number * tiles;
        const struct Piece piece = pieces[number];
        const u64 skew = piece.target & 15;
        const u64 begin = tile ? (u64)tile * tile_nbytes - skew : 0;
        const u64 end = (u64)(tile + 1) * tile_nbytes - skew;

        if (begin < piece.nbytes)
            copy_span(piece.source + begin, piece.target + begin, (end < piece.nbytes ? end : piece.nbytes) - begin, lane);
    }
}
