// Exact top-k of float32 rows of any length for k <= 2048, positions ascending.
//
// A score and its position make one 64-bit word, best = largest: the score's bits in the order of floats, then the
// position's complement. No two words of a row are equal, so ties need no rule of their own.
//
// 1. A sample of 4096 scores of the row gives a bound that a few more than k scores should reach.
// 2. The row is read once; the words at or above the bound, about 2 k of them, gather in shared memory.
// 3. kth() finds the k-th of them exactly: one histogram over the range they really span, then a comparison of all
//    pairs in the bin that holds the k-th.
// 4. The k winners set bits in a map of the row; reading the map gives the positions in order.
// A row no longer than the buffer needs no bound. Where the bound was wrong (less than k reach it, or more than fit),
// careful() reads the row again and keeps the best k so far, whatever the scores are.
//
// Few rows: CLUSTER blocks share a row, each streams a part, and the first one's shared memory collects the words.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int CAPACITY = 8192;    // words in the buffer, 64 KiB
constexpr int BINS = 2048;        // also the largest k: the winners' positions take the histogram's place
constexpr int FINISH = 256;       // words in a bin that are compared pair by pair
constexpr int SAMPLE_VECS = 1024; // groups of 4 neighbours
constexpr int UNROLL = 4;         // vectors of 4 scores in flight per thread
constexpr u32 ALL = 0xffffffffu;
#define MINUS_INFINITY __uint_as_float(0xff800000u)

struct State {
    u64 threshold;
    int count;          // words in the buffer; may pass CAPACITY, those past it are lost
    int listed;
    int bin, above, inside;
    int base;
    u32 low, high;
    int warp_sums[32];
};

struct Row {
    const float4* vectors; // aligned down to 16 bytes: `lead` scores before the row belong to the first one
    int lead, length, num_vectors;
};

// ---- what a cluster needs: inline PTX, a plain block never calls it ------------------------------------------------
// <cluster>
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Address of the same variable in the cluster's first block.
__device__ __forceinline__ u32 leader_address(const void* pointer) {
    u32 address;
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(address) : "r"(shared_address(pointer)));
    return address;
}

__device__ __forceinline__ int leader_add(int* pointer, int value) {
    int old;
    asm volatile("atom.shared::cluster.add.s32 %0, [%1], %2;"
                 : "=r"(old)
                 : "r"(leader_address(pointer)), "r"(value)
                 : "memory");
    return old;
}

__device__ __forceinline__ void leader_store(u64* pointer, u64 value) {
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(leader_address(pointer)), "l"(value) : "memory");
}

__device__ __forceinline__ void prefetch(const void* pointer, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(pointer), "r"(bytes) : "memory");
}
// </cluster>

// ---- words ---------------------------------------------------------------------------------------------------------
// Order of floats as order of integers; -0.0 as 0.0, NaN as -inf.
__device__ __forceinline__ u32 key_of(float score) {
    u32 bits = __float_as_uint(score + 0.0f);
    if (score != score) bits = 0xff800000u;
    return bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float score_of(u32 key) {
    return __uint_as_float((key & 0x80000000u) ? key ^ 0x80000000u : ~key);
}

__device__ __forceinline__ u64 word_of(float score, int position) {
    return (static_cast<u64>(key_of(score)) << 32) | static_cast<u32>(~position);
}

__device__ __forceinline__ int position_of(u64 word) { return static_cast<int>(~static_cast<u32>(word)); }

__device__ __forceinline__ float component(const float4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// ---- within a block ------------------------------------------------------------------------------------------------
__device__ __forceinline__ int warp_scan(int value) {
    int lane = threadIdx.x & 31;
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(ALL, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// Sum of `value` over the threads before this one; `total` gets the sum over all.
template <int THREADS> __device__ int scan(State& s, int value, int& total) {
    int warp = threadIdx.x / 32, inclusive = warp_scan(value);
    if ((threadIdx.x & 31) == 31) s.warp_sums[warp] = inclusive;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        int sum = s.warp_sums[w];
        if (w < warp) before += sum;
        total += sum;
    }
    __syncthreads();
    return before + inclusive - value;
}

// A word that exactly `rank` of buffer[0..n) reach, 1 <= rank <= n. Overwrites the histogram.
template <int THREADS> __device__ u64 kth(State& s, const u64* buffer, u32* histogram, int n, int rank) {
    const int tid = threadIdx.x;
    u32 low = ALL, high = 0;
    for (int i = tid; i < n; i += THREADS) {
        u32 key = static_cast<u32>(buffer[i] >> 32);
        low = min(low, key);
        high = max(high, key);
    }
    low = __reduce_min_sync(ALL, low);
    high = __reduce_max_sync(ALL, high);
    if (tid == 0) s.low = ALL, s.high = 0;
    __syncthreads();
    if ((tid & 31) == 0) {
        atomicMin(&s.low, low);
        atomicMax(&s.high, high);
    }
    __syncthreads();
    u64 first = static_cast<u64>(s.low) << 32, last = (static_cast<u64>(s.high) << 32) | ALL;
    int inside;
    do {
        // 2048 bins over [first, last]
        int shift = max(64 - 11 - __clzll(static_cast<long long>(last - first)), 0);
        for (int i = tid; i < BINS; i += THREADS) histogram[i] = 0;
        __syncthreads();
        for (int i = tid; i < n; i += THREADS) {
            u64 word = buffer[i];
            if (word >= first && word <= last) atomicAdd(&histogram[static_cast<u32>((word - first) >> shift)], 1u);
        }
        __syncthreads();
        constexpr int EACH = BINS / THREADS;
        int top = BINS - 1 - tid * EACH, sum = 0, total;
        for (int i = 0; i < EACH; i++) sum += static_cast<int>(histogram[top - i]);
        int above = scan<THREADS>(s, sum, total);
        if (above < rank && rank <= above + sum) {
            int bin = top, here = static_cast<int>(histogram[bin]);
            while (above + here < rank) {
                above += here;
                here = static_cast<int>(histogram[--bin]);
            }
            s.bin = bin, s.above = above, s.inside = here;
        }
        __syncthreads();
        first += static_cast<u64>(static_cast<u32>(s.bin)) << shift;
        last = first + ((1ull << shift) - 1);
        rank -= s.above;
        inside = s.inside;
        if (rank == inside) return first;
    } while (inside > FINISH);

    u64* list = reinterpret_cast<u64*>(histogram);
    if (tid == 0) s.listed = 0;
    __syncthreads();
    for (int i = tid; i < n; i += THREADS) {
        u64 word = buffer[i];
        if (word >= first && word <= last) list[atomicAdd(&s.listed, 1)] = word;
    }
    __syncthreads();
    if (tid < inside) {
        u64 mine = list[tid];
        int better = 0;
        for (int i = 0; i < inside; i++) better += list[i] > mine;
        if (better == rank - 1) s.threshold = mine;
    }
    __syncthreads();
    return s.threshold;
}

// The scores of vector v that belong to the row, as bits.
__device__ __forceinline__ u32 valid_scores(const Row& row, int v) {
    u32 bits = v < row.num_vectors ? 15u : 0u;
    if (v == 0) bits &= 15u << row.lead;
    if (v == row.num_vectors - 1) bits &= 15u >> (4 * row.num_vectors - row.lead - row.length);
    return bits;
}

// The key that about 1.5 k scores of the row reach, and in nearly all rows at least k and at most CAPACITY: 6 standard
// deviations of the sample's count lie between. Uses the buffer.
template <int THREADS> __device__ u32 sampled_bound(State& s, u64* buffer, u32* histogram, const Row& row, int k) {
    constexpr int EACH = SAMPLE_VECS / THREADS;
    float4 x[EACH];
    int v[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        v[e] = static_cast<int>(static_cast<long long>(row.num_vectors) * (threadIdx.x + e * THREADS) / SAMPLE_VECS);
        x[e] = __ldg(row.vectors + v[e]);
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        u32 valid = valid_scores(row, v[e]);
        for (int j = 0; j < 4; j++) {
            float score = valid >> j & 1 ? component(x[e], j) : MINUS_INFINITY;
            buffer[4 * (threadIdx.x + e * THREADS) + j] = word_of(score, 4 * v[e] + j);
        }
    }
    __syncthreads();
    constexpr float SAMPLES = 4 * SAMPLE_VECS;
    float expected = SAMPLES * k / row.length, most = SAMPLES * 0.6f * CAPACITY / row.length;
    float rank = fminf(1.5f * expected + 6.0f * sqrtf(expected) + 8.0f, most);
    u64 bound = kth<THREADS>(s, buffer, histogram, 4 * SAMPLE_VECS, max(static_cast<int>(rank), 1));
    __syncthreads();
    return static_cast<u32>(bound >> 32);
}

// Appends the words of vectors [begin, end) whose score is at least `bound`, which is above -inf.
template <int THREADS> __device__ void stream(State& s, u64* buffer, const Row& row, int begin, int end, float bound) {
    const int tid = threadIdx.x, lane = tid & 31;
    for (int start = begin; start < end; start += UNROLL * THREADS) {
        // Nothing looks at a loaded score before all loads are under way.
        float4 x[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) x[u] = __ldg(row.vectors + min(start + u * THREADS + tid, end - 1));
        u32 valid = 0xffffu;
        if (start == 0 || start + UNROLL * THREADS >= end) {
            valid = 0;
            for (int u = 0; u < UNROLL; u++) {
                int v = start + u * THREADS + tid;
                if (v < end) valid |= valid_scores(row, v) << 4 * u;
            }
        }
        u32 reached = 0;
#pragma unroll
        for (int i = 0; i < 4 * UNROLL; i++) reached |= component(x[i / 4], i % 4) >= bound ? 1u << i : 0u;
        reached &= valid;
        int mine = __popc(reached);
        if (!__any_sync(ALL, mine)) continue;
        int inclusive = warp_scan(mine), slot = 0;
        if (lane == 31) slot = atomicAdd(&s.count, inclusive);
        slot = __shfl_sync(ALL, slot, 31) + inclusive - mine;
        int position = 4 * (start + tid) - row.lead;
#pragma unroll
        for (int i = 0; i < 4 * UNROLL; i++) {
            if (reached >> i & 1) {
                if (slot < CAPACITY) {
                    buffer[slot] = word_of(component(x[i / 4], i % 4), position + i / 4 * 4 * THREADS + i % 4);
                }
                slot++;
            }
        }
    }
    __syncthreads();
}

// The whole row, a short one, into the buffer.
template <int THREADS> __device__ void take_all(u64* buffer, const Row& row) {
    const float* scores = reinterpret_cast<const float*>(row.vectors) + row.lead;
    for (int i = threadIdx.x; i < row.length; i += THREADS) buffer[i] = word_of(__ldg(scores + i), i);
    __syncthreads();
}

// The best k of the row so far and what came after them, for any scores whatever. Returns the number of words, >= k.
template <int THREADS> __device__ int careful(State& s, u64* buffer, u32* histogram, const Row& row, int k) {
    static_assert(BINS + 4 * THREADS <= CAPACITY, "k words and one step must fit");
    const int tid = threadIdx.x;
    u64 bound = 0;
    int n = 0;
    if (tid == 0) s.count = 0;
    __syncthreads();
    for (int start = 0; start < row.num_vectors; start += THREADS) {
        if (n + 4 * THREADS > CAPACITY) {
            bound = kth<THREADS>(s, buffer, histogram, n, k);
            if (tid == 0) s.count = 0;
            for (int i = 0; i < n; i += THREADS) {
                u64 word = i + tid < n ? buffer[i + tid] : 0;
                // Words move down, and never onto one that is yet to be read.
                __syncthreads();
                if (word >= bound) buffer[atomicAdd(&s.count, 1)] = word;
            }
        }
        int v = start + tid;
        if (v < row.num_vectors) {
            float4 x = __ldg(row.vectors + v);
            for (int j = 0; j < 4; j++) {
                int position = 4 * v + j - row.lead;
                u64 word = word_of(component(x, j), position);
                if (position >= 0 && position < row.length && word > bound) buffer[atomicAdd(&s.count, 1)] = word;
            }
        }
        __syncthreads();
        n = s.count;
        __syncthreads();
    }
    return n;
}

// Writes the positions of the k words at or above the threshold, ascending. Overwrites the buffer.
template <int THREADS>
__device__ void write(
    State& s, u64* buffer, u32* histogram, int n, u64 threshold, const Row& row, int k, long long* out
) {
    const int tid = threadIdx.x;
    int* winners = reinterpret_cast<int*>(histogram);
    __syncthreads();
    if (tid == 0) s.listed = 0;
    __syncthreads();
    for (int i = tid; i < n; i += THREADS) {
        u64 word = buffer[i];
        if (word >= threshold) winners[atomicAdd(&s.listed, 1)] = position_of(word);
    }
    u32* map = reinterpret_cast<u32*>(buffer);
    constexpr int WINDOW = 2 * CAPACITY;
    int words = (row.length + 31) / 32, written = 0;
    for (int first = 0; first < words; first += WINDOW) {
        int count = min(words - first, WINDOW), each = (count + THREADS - 1) / THREADS;
        __syncthreads();
        for (int i = tid; i < count; i += THREADS) map[i] = 0;
        __syncthreads();
        for (int i = tid; i < k; i += THREADS) {
            int word = winners[i] / 32 - first;
            if (word >= 0 && word < count) atomicOr(&map[word], 1u << (winners[i] & 31));
        }
        __syncthreads();
        int begin = min(tid * each, count), end = min(begin + each, count), mine = 0, total;
        for (int i = begin; i < end; i++) mine += __popc(map[i]);
        int slot = written + scan<THREADS>(s, mine, total);
        for (int i = begin; i < end; i++) {
            for (u32 bits = map[i]; bits; bits &= bits - 1) {
                out[slot++] = 32ll * (first + i) + __ffs(static_cast<int>(bits)) - 1;
            }
        }
        written += total;
    }
}

// ---- the kernel ----------------------------------------------------------------------------------------------------
template <int THREADS, int CLUSTER>
__device__ void topk(const float* logits, long long stride, const long long* lengths, long long* out, int k) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ State s;
    u64* buffer = reinterpret_cast<u64*>(shared);
    u32* histogram = reinterpret_cast<u32*>(buffer + CAPACITY);
    const int tid = threadIdx.x, part = static_cast<int>(blockIdx.x % CLUSTER);
    const long long r = blockIdx.x / CLUSTER;
    out += r * k;

    Row row;
    row.length = static_cast<int>(lengths[r]);
    unsigned long long address = reinterpret_cast<unsigned long long>(logits + r * stride);
    row.lead = static_cast<int>(address / 4 % 4);
    row.vectors = reinterpret_cast<const float4*>(address - 4 * row.lead);
    row.num_vectors = (row.lead + row.length + 3) / 4;

    // The whole cluster agrees on these: they depend on the row alone.
    if (row.length <= k) {
        if (part == 0) {
            for (int i = tid; i < k; i += THREADS) out[i] = i < row.length ? i : -1;
        }
        return;
    }
    int n = row.length;
    if (row.length <= CAPACITY) {
        if (part != 0) return;
        take_all<THREADS>(buffer, row);
    } else {
        int begin = static_cast<int>(static_cast<long long>(row.num_vectors) * part / CLUSTER);
        int end = static_cast<int>(static_cast<long long>(row.num_vectors) * (part + 1) / CLUSTER);
        if (CLUSTER > 1) {
            // The part comes from memory while the sample is looked at: 16 KiB a thread, 256 KiB at most.
            int first = begin + 1024 * tid;
            if (tid < 16 && first < end) prefetch(row.vectors + first, 16u * static_cast<u32>(min(end - first, 1024)));
        }
        u32 bound = sampled_bound<THREADS>(s, buffer, histogram, row, k);
        if (tid == 0) s.count = 0;
        __syncthreads();
        if (CLUSTER > 1) cluster_arrive();
        const bool bounded = bound > key_of(MINUS_INFINITY);
        if (bounded) stream<THREADS>(s, buffer, row, begin, end, score_of(bound));
        if (CLUSTER > 1) {
            cluster_wait(); // every block has left its sample: the first one's buffer is free beyond its own words
            if (part != 0) {
                if (tid == 0) s.base = leader_add(&s.count, s.count);
                __syncthreads();
                int base = s.base;
                int mine = min(s.count, CAPACITY - base);
                for (int i = tid; i < mine; i += THREADS) leader_store(buffer + base + i, buffer[i]);
            }
            cluster_arrive();
            cluster_wait();
            if (part != 0) return;
        }
        n = s.count;
        __syncthreads();
        if (!bounded || n < k || n > CAPACITY) n = careful<THREADS>(s, buffer, histogram, row, k);
    }
    u64 threshold = kth<THREADS>(s, buffer, histogram, n, k);
    write<THREADS>(s, buffer, histogram, n, threshold, row, k, out);
}

#define KERNEL(NAME, THREADS, CLUSTER, BLOCKS, ATTRIBUTE)                                                              \
    extern "C" __global__ void ATTRIBUTE __launch_bounds__(THREADS, BLOCKS)                                            \
        NAME(const float* logits, long long stride, const long long* lengths, long long* out, int k) {                 \
        topk<THREADS, CLUSTER>(logits, stride, lengths, out, k);                                                       \
    }

KERNEL(topk_many_rows, 512, 1, 3, )
KERNEL(topk_cluster_1, 1024, 1, 1, )
KERNEL(topk_cluster_2, 1024, 2, 1, __cluster_dims__(2, 1, 1))
KERNEL(topk_cluster_4, 1024, 4, 1, __cluster_dims__(4, 1, 1))
KERNEL(topk_cluster_8, 1024, 8, 1, __cluster_dims__(8, 1, 1))
