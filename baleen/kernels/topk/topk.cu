// Exact top-k of float32 rows of any length for k <= 2048: positions ascending, slots in that order, or a bitmask.
//
// What is chosen: the scores above a threshold, and of those equal to it the ones up to some position; kth.cuh finds
// the two among scores that threads hold in registers, output.cuh writes what they choose.
//
// - A row of up to 16 scores a thread lies in registers, and is read once.
// - A longer row: a histogram of 4096 scores gives a bound that a few more than k should reach. The row is read once,
//   and the scores that reach the bound, about 1.5 to 2 k of them, gather in shared memory; they are what is then
//   looked at. Where the bound was wrong (less than k reach it, or more than fit), careful() reads the row again and
//   keeps the best k so far, whatever the scores are.
// - Where each block has a multiprocessor of its own, a ring of bulk copies fills its shared memory with the row from
//   the start, while the sample is looked at: the memory never waits for the bound.
// - Few long rows: CLUSTER blocks share one, each streams a part, and the first one's shared memory collects them.
//
// Hot code is short: what runs once in a layer finds no instruction cache warm. Rare cases are functions of their own.

#include "kth.cuh"
#include "output.cuh"

// ---- long rows -----------------------------------------------------------------------------------------------------
// The rank in the sample of a bound that about 1.25 k scores of the row reach, and in nearly all rows at least k and at
// most `capacity`: 5 standard deviations of the sample's count lie between.
__device__ __forceinline__ int bound_rank(int span, int k, int capacity) {
    float density = __fdividef(SAMPLE_VECS, static_cast<float>(span)), expected = density * k;
    float wanted = fminf(expected * (1.25f + 5.0f * rsqrtf(expected)) + 8.0f, 0.6f * density * capacity);
    return max(static_cast<int>(wanted), 1);
}

// Where a block's part of the row begins.
template <int CLUSTER> __device__ __forceinline__ int first_vector(const Row& row, int part) {
    return static_cast<int>(static_cast<long long>(row.num_vectors) * part / CLUSTER);
}

// The scores of the row among those of one step of stream(), as bits. The step's vectors begin at `start`, the block's
// part ends at `end`.
template <int THREADS> __device__ __forceinline__ u32 valid_in_step(const Row& row, int start, int end) {
    if (start > 0 && start + UNROLL * THREADS < end) return 0xffffu;
    u32 valid = 0;
    for (int u = 0; u < UNROLL; u++) {
        int v = start + u * THREADS + static_cast<int>(threadIdx.x);
        if (v < end) valid |= valid_scores(row, v) << 4 * u;
    }
    return valid;
}

// The first word of the buffer for this thread's `mine`; -1 for all of the warp if it has none or they do not fit.
__device__ __forceinline__ int reserve(State& s, int capacity, int mine) {
    if (!__any_sync(ALL, mine)) return -1;
    int inclusive = warp_scan(mine), slot = 0;
    if ((threadIdx.x & 31) == 31) slot = atomicAdd(&s.count, inclusive);
    slot = __shfl_sync(ALL, slot, 31);
    if (slot + __shfl_sync(ALL, inclusive, 31) > capacity) return -1;
    return slot + inclusive - mine;
}

// Appends the scores of vectors [begin, end) that are at least `bound`, which is above -inf.
template <int THREADS>
__device__ __forceinline__ void
stream(State& s, u64* buffer, int capacity, const Row& row, int begin, int end, float bound) {
    const int tid = threadIdx.x;
    for (int start = begin; start < end; start += UNROLL * THREADS) {
        // Nothing looks at a loaded score before all loads are under way.
        float4 x[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) x[u] = __ldg(row.vectors + min(start + u * THREADS + tid, end - 1));
        u32 valid = valid_in_step<THREADS>(row, start, end), reached = 0;
#pragma unroll
        for (int i = 0; i < 4 * UNROLL; i++) reached |= component(x[i / 4], i % 4) >= bound ? 1u << i : 0u;
        reached &= valid;
        int slot = reserve(s, capacity, __popc(reached));
        if (slot < 0) continue;
        u64* next = buffer + slot;
        const int first = 4 * start + row.position<THREADS>(0);
#pragma unroll
        for (int i = 0; i < 4 * UNROLL; i++) {
            if (reached >> i & 1) *next++ = word_of(component(x[i / 4], i % 4), first + i / 4 * 4 * THREADS + i % 4);
        }
    }
    __syncthreads();
}

// A block's part of a row on its way through shared memory: steps of stream(), the first of them under way at once.
template <int THREADS> struct Ring {
    static constexpr int STEP = UNROLL * THREADS, BYTES = STAGES * STEP * 16; // vectors; of all slots

    float4* slots; // STAGES of a step each
    u64* arrived;  // of each slot
    const float4* vectors;
    int begin, end;

    __device__ __forceinline__ void fetch(int step) const {
        const int start = begin + step * STEP, slot = step % STAGES;
        if (start >= end) return;
        copy_once(slots + slot * STEP, vectors + start, 16u * static_cast<u32>(min(end - start, STEP)), arrived + slot);
    }

    // In one thread. The block may not end before it has waited for all steps.
    __device__ __forceinline__ void open() const {
#pragma unroll
        for (int i = 0; i < STAGES; i++) init_barrier(arrived + i, 1);
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) fetch(i);
    }

    __device__ __forceinline__ const float4* wait(int step) const {
        while (!is_complete(arrived + step % STAGES, step / STAGES & 1)) continue;
        return slots + step % STAGES * STEP;
    }
};

// stream() from a ring. The few scores that reach the bound are read again: registers have no index.
template <int THREADS>
__device__ __forceinline__ void
drain(State& s, u64* buffer, int capacity, const Row& row, const Ring<THREADS>& ring, float bound) {
    const int tid = threadIdx.x;
#pragma unroll 1
    for (int step = 0, start = ring.begin; start < ring.end; step++, start += ring.STEP) {
        const float4* vectors = ring.wait(step);
        const int first = 4 * start - row.lead;
        u32 reached = 0;
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float4 x = vectors[u * THREADS + tid];
#pragma unroll
            for (int j = 0; j < 4; j++) reached |= component(x, j) >= bound ? 1u << (4 * u + j) : 0u;
        }
        reached &= valid_in_step<THREADS>(row, start, ring.end);
        int slot = reserve(s, capacity, __popc(reached));
#pragma unroll 1
        for (u32 left = slot < 0 ? 0 : reached; left; left &= left - 1) {
            u32 i = __ffs(static_cast<int>(left)) - 1, at = 4 * (i / 4 * THREADS + tid) + i % 4;
            buffer[slot++] = word_of(reinterpret_cast<const float*>(vectors)[at], first + static_cast<int>(at));
        }
        if (start + STAGES * ring.STEP < ring.end) {
            __syncthreads(); // all have read the slot
            if (tid == 0) ring.fetch(step + STAGES);
        }
    }
    __syncthreads();
}

// The best k of the row so far and what came after them, for any scores whatever. Returns the number of words, >= k.
template <int THREADS>
__device__ __noinline__ int careful(State& s, u64* buffer, int capacity, Row row, int k) {
    const int tid = threadIdx.x;
    float bound = NOT_A_NUMBER;
    int n = 0;
    if (tid == 0) s.count = 0;
    __syncthreads();
    for (int start = 0; start < row.num_vectors; start += THREADS) {
        if (n + 4 * THREADS > capacity) {
            Choice best = kth<THREADS>(s, buffer, nullptr, n, k);
            if (tid == 0) s.count = 0;
#pragma unroll 1
            for (int i = tid; i - tid < n; i += THREADS) {
                u64 word = i < n ? buffer[i] : 0;
                // Words move down, and never onto one that is yet to be read.
                __syncthreads();
                if (i < n && best.takes(word_score(word), word_position(word))) buffer[atomicAdd(&s.count, 1)] = word;
            }
            bound = best.score;
        }
        int v = start + tid;
        if (v < row.num_vectors) {
            float x[4];
            unpack(x, __ldg(row.vectors + v), row, v);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                // One that is equal to the bound comes too late.
                bool takes = x[j] == x[j] && !(x[j] <= bound);
                if (takes) buffer[atomicAdd(&s.count, 1)] = word_of(x[j], 4 * v + j - row.lead);
            }
        }
        __syncthreads();
        n = s.count;
        __syncthreads();
    }
    return n;
}

// Gathers what reaches the bound, and more where that is wrong, in the buffer of the cluster's first block. Returns the
// number of words there, k or more; 0 in the other blocks.
template <int THREADS, int CLUSTER, bool RING>
__device__ __forceinline__ int
gather(State& s, u64* buffer, int capacity, const Row& row, const Ring<THREADS>& ring, float bound, int k) {
    const int part = static_cast<int>(blockIdx.x % CLUSTER);
    const bool bounded = bound > -INFINITE;
    if (CLUSTER > 1) cluster_arrive(); // the buffer no longer has the sample, and the count is 0
    if (RING) {
        drain<THREADS>(s, buffer, capacity, row, ring, bound);
    } else if (bounded) {
        stream<THREADS>(s, buffer, capacity, row, ring.begin, ring.end, bound);
    }
    if (CLUSTER > 1) {
        cluster_wait();
        if (part != 0) {
            if (threadIdx.x == 0) {
                s.base = leader_add(&s.count, s.count);
                announce(&s.delivery, 8 * max(min(s.count, capacity - s.base), 0));
            }
            __syncthreads();
            int base = s.base, mine = min(s.count, capacity - base);
#pragma unroll 1
            for (int i = threadIdx.x; i < mine; i += THREADS) leader_store(buffer + base + i, buffer[i], &s.delivery);
            return 0;
        }
        while (!is_complete(&s.delivery, 0)) continue;
    }
    int n = s.count;
    __syncthreads();
    return bounded && n >= k && n <= capacity ? n : careful<THREADS>(s, buffer, capacity, row, k);
}

// ---- the kernel ----------------------------------------------------------------------------------------------------
// What the histogram of the scores x (each(f) calls f(x[i], i)) says: the choice of `rank` of them. word_at(i) is the
// word of score i.
template <int THREADS, class Each, class Words>
__device__ __forceinline__ Choice choose(State& s, Each each, Words word_at, const Bins& bins, int rank) {
    // The bin and its neighbours, and then those of the bin, read again: registers have no index.
    float low = bins.has_edges() ? bins.edge(bins.bin - 1) : -INFINITE;
    float high = bins.has_edges() ? bins.edge(bins.bin + 2) : INFINITE;
    u32 close = 0;
    each([&](float v, int i) { close |= v >= low && v <= high ? 1u << i : 0; });
    for (; close; close &= close - 1) {
        u64 word = word_at(__ffs(static_cast<int>(close)) - 1);
        if (bins.holds(word_score(word))) enlist(s, word);
    }
    return finish<THREADS>(s, rank, false);
}

// CAPACITY: words of the buffer, 0 where no row is longer than what the registers hold. A ring takes the map's place
// until the row has been read.
template <int THREADS, int CLUSTER, int CAPACITY, bool RING>
__device__ __forceinline__ void
topk(State& s, u32* map, u64* buffer, Row row, float4 (&vectors)[HELD / 4], int span, const Request& request) {
    static_assert(CAPACITY == 0 || CAPACITY >= BINS + 4 * THREADS, "the best so far and one step must fit");
    static_assert(CAPACITY <= HELD * THREADS, "the buffer's words go to registers");
    constexpr int SAMPLED = SAMPLE_VECS / THREADS;
    const int tid = threadIdx.x, part = static_cast<int>(blockIdx.x % CLUSTER), k = request.k;
    const bool is_short = CAPACITY == 0 || row.num_vectors <= HELD / 4 * THREADS;
    if (is_short && part != 0) return;
    const int begin = first_vector<CLUSTER>(row, part), end = first_vector<CLUSTER>(row, part + 1);
    const Ring<THREADS> ring = {reinterpret_cast<float4*>(map), s.arrived, row.vectors, begin, end};
    if (RING && !is_short && tid == 32) ring.open();
    // The sample of a long row and then what is chosen from go through one loop: their code is the same.
    bool sampled = !is_short;
    float x[HELD];
    Held each = {x, 0};
    Bins bins;
    int rank, inside, n = row.length;
    if (is_short) {
        if (CAPACITY && span > HELD / 4 * THREADS) load<THREADS>(vectors, row, row.num_vectors);
        each.groups = (row.num_vectors + THREADS - 1) / THREADS;
        rank = k;
#pragma unroll
        for (int u = 0; u < HELD / 4; u++) unpack(x + 4 * u, vectors[u], row, u * THREADS + tid);
    } else {
        if (4ll * row.num_vectors < span) load_sample<THREADS>(vectors, row, span = row.num_vectors);
        each.groups = SAMPLED;
        rank = bound_rank(span, k, CAPACITY);
#pragma unroll
        for (int e = 0; e < SAMPLED; e++) unpack(x + 4 * e, vectors[e], row, sample_vector(e * THREADS + tid, span));
    }
    while (true) {
        const int wanted = rank;
        inside = spread<THREADS>(s, each, Any(), bins, rank);
        if (!sampled) break;
        float bound = bins.edge(bins.bin);
        if (inside > 16 + wanted / 8) {
            // Bins too wide for the sample. The buffer is still free.
            each([&](float v, int i) { buffer[i * THREADS + tid] = word_of(v, i * THREADS + tid); });
            __syncthreads();
            bound = kth<THREADS>(s, buffer, nullptr, 4 * SAMPLE_VECS, wanted).score;
        }
        n = gather<THREADS, CLUSTER, RING>(s, buffer, CAPACITY, row, ring, bound, k);
        if (CLUSTER > 1 && part != 0) return;
        sampled = false, rank = k, each.groups = (n + 4 * THREADS - 1) / (4 * THREADS);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            x[i] = NOT_A_NUMBER;
            if (i / 4 < each.groups && i * THREADS + tid < n) x[i] = word_score(buffer[i * THREADS + tid]);
        }
    }
    auto word_at = [&](int i) {
        return is_short ? row_word(row.scores(), row.position<THREADS>(i)) : buffer[i * THREADS + tid];
    };
    Choice choice = inside <= FINISH ? choose<THREADS>(s, each, word_at, bins, rank)
                                     : kth<THREADS>(s, is_short ? nullptr : buffer, row.scores(), n, k);
    u32 taken = 0;
    each([&](float v, int i) { taken |= v >= choice.score ? 1u << i : 0; });
    if (choice.position < END) {
        each([&](float v, int i) {
            if (v == choice.score && word_position(word_at(i)) > choice.position) taken &= ~(1u << i);
        });
    }
    if (is_short) put_short<THREADS>(s, taken, row, request);
    else put_long<THREADS>(s, map, buffer, taken, row.length, request);
    if (request.output == MASK) return;
    __syncthreads();
    put<THREADS>(request, [&](int i) { return reinterpret_cast<int*>(s.histogram)[i]; });
}

// The row of this block, and the start of it.
template <int THREADS, int CLUSTER, int CAPACITY, bool RING>
__device__ __forceinline__ void start(
    const float* logits, long long stride, const long long* lengths, long long pages_stride, int num_queries,
    Request request
) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ State s;
    u32* map = reinterpret_cast<u32*>(shared);
    u64* buffer = reinterpret_cast<u64*>(shared + (RING ? Ring<THREADS>::BYTES : 4 * MAP_WORDS<THREADS>));
    const int tid = threadIdx.x, r = static_cast<int>(blockIdx.x / CLUSTER);
    begin_after_previous_kernel();
    Row row;
    u64 address = reinterpret_cast<u64>(logits + r * stride);
    row.lead = static_cast<int>(address / 4 % 4);
    row.vectors = reinterpret_cast<const float4*>(address - 4 * row.lead);
    row.length = static_cast<int>(__ldg(lengths + r));
    // Loads start before the length is known, from what there is room for: all scores, or the sample.
    const int span = (row.lead + request.columns + 3) / 4;
    float4 vectors[HELD / 4];
    if (CAPACITY == 0 || span <= HELD / 4 * THREADS) load<THREADS>(vectors, row, span);
    else load_sample<THREADS>(vectors, row, span);
    reinterpret_cast<Counts<BINS / THREADS>*>(s.histogram)[tid] = {};
    if (tid == 0) s.count = 0;
    if (CLUSTER > 1 && tid == 0) init_barrier(&s.delivery, CLUSTER - 1);
    row.num_vectors = (row.lead + row.length + 3) / 4;
    request.out += static_cast<long long>(r) * request.row_bytes;
    if (request.pages) {
        request.pages += r / num_queries * pages_stride;
        if (128 * tid <= row.length >> request.page_shift << (2 + request.long_pages)) {
            prefetch_line(request.pages + 128 * tid);
        }
    }
    // The whole cluster agrees on what to do: it depends on the row alone.
    if (row.length > request.k) {
        topk<THREADS, CLUSTER, CAPACITY, RING>(s, map, buffer, row, vectors, span, request);
    } else if (blockIdx.x % CLUSTER == 0) {
        put_all<THREADS>(request, row.length);
    }
}

#define KERNEL(NAME, THREADS, CLUSTER, CAPACITY, RING, BLOCKS, ATTRIBUTE)                                              \
    extern "C" __global__ void ATTRIBUTE __launch_bounds__(THREADS, BLOCKS) NAME(                                      \
        const float* logits, long long stride, int columns, const long long* lengths, int k, int output, char* out,    \
        int row_bytes, const char* pages, long long pages_stride, int num_queries, int page_shift, int long_pages      \
    ) {                                                                                                                \
        Request request = {out, pages, output, columns, k, row_bytes, page_shift, long_pages};                         \
        start<THREADS, CLUSTER, CAPACITY, RING>(logits, stride, lengths, pages_stride, num_queries, request);          \
    }

// Rows of up to 16 scores a thread
KERNEL(topk_short_256, 256, 1, 0, false, 5, )
KERNEL(topk_short_512, 512, 1, 0, false, 3, )
KERNEL(topk_short_1024, 1024, 1, 0, false, 1, )
// and longer ones: two blocks on a multiprocessor, each with a row,
KERNEL(topk_by_1, 512, 1, 8192, false, 2, )
// or one with a ring, and a row shared by up to eight.
KERNEL(topk_ring_1, 512, 1, 8192, true, 1, )
KERNEL(topk_ring_2, 512, 2, 8192, true, 1, __cluster_dims__(2, 1, 1))
KERNEL(topk_ring_4, 512, 4, 8192, true, 1, __cluster_dims__(4, 1, 1))
KERNEL(topk_ring_8, 512, 8, 8192, true, 1, __cluster_dims__(8, 1, 1))
