// Exact top-k of float32 rows of any length for k <= 2048: positions ascending, slots in that order, or a bitmask.
//
// What is chosen: the scores above a threshold, and of those equal to it the ones up to some position. To find the two
// among scores that threads hold in registers, a histogram between the extremes tells the bin of the k-th, and each
// score of that bin is compared with each. If they are too many, kth() gives that bin a histogram of its own, and so
// on; scores that are all equal are told apart by a histogram of their positions.
//
// - A row of up to 16 scores a thread lies in registers, and is read once.
// - A longer row: a histogram of 4096 scores gives a bound that a few more than k should reach. The row is read once,
//   and the scores that reach the bound, about 1.5 to 2 k of them, gather in shared memory; they are what is then
//   looked at. Where the bound was wrong (less than k reach it, or more than fit), careful() reads the row again and
//   keeps the best k so far, whatever the scores are.
// - Few long rows: CLUSTER blocks share one, each streams a part, and the first one's shared memory collects them.
//
// The winners are bits in order of position; counting bits gives each its place in the output.
//
// Hot code is short: what runs once in a layer finds no instruction cache warm. Rare cases are functions of their own.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int BINS = 2048;        // also the largest k: the output is put in order in the histogram's place
constexpr int FINISH = 256;       // scores of a bin that are compared each with each
constexpr int SAMPLE_VECS = 1024; // groups of 4 neighbours
constexpr int UNROLL = 4;         // vectors of 4 scores in flight per thread
constexpr int HELD = 16;          // scores a thread holds
constexpr u32 ALL = 0xffffffffu;
constexpr int END = 0x7fffffff; // after any position
#define INFINITE __uint_as_float(0x7f800000u)
#define NOT_A_NUMBER __uint_as_float(0x7fc00000u)
#define LARGEST 3.4028234e38f

enum Output { POSITIONS, SLOTS, MASK };

struct Request {
    char* out;         // of this row
    const char* pages; // of this row's request; null: positions are slots
    int output, columns, k, row_bytes, page_shift;
    int long_pages;    // 1: int64, 0: int32
};

struct State {
    __align__(16) u32 histogram[BINS]; // empty when nothing is being counted
    u64 list[FINISH];                  // as large as the score is good, then the position's complement
    u64 threshold, delivery;
    u64 wide_sums[32];
    u32 lowest[32], highest[32];
    int sums[32];
    int count; // words in the buffer; may pass its capacity, those past it are lost
    int listed, bin, above, inside, base;
};

struct Row {
    const float4* vectors; // aligned down to 16 bytes: `lead` scores before the row belong to the first one
    int lead, length, num_vectors;

    __device__ __forceinline__ const float* scores() const { return reinterpret_cast<const float*>(vectors) + lead; }
    // The position of score i that this thread holds of a row in registers.
    template <int THREADS> __device__ __forceinline__ int position(int i) const {
        return 4 * (i / 4 * THREADS + static_cast<int>(threadIdx.x)) + i % 4 - lead;
    }
};

struct Choice {
    float score;
    int position;

    __device__ __forceinline__ bool takes(float x, int p) const { return x > score || (x == score && p <= position); }
};

// ---- what a cluster needs: inline PTX, a plain block never calls it ------------------------------------------------
// <cluster>
// Without a fence, which costs as much as all that a cluster does: what one block wrote is not ordered for the others.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

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

// A delivery to the first block: each of its senders announces its bytes once, and what it stores counts them down.
__device__ __forceinline__ void expect_senders(u64* delivery, int senders) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(delivery)), "r"(senders) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void announce(u64* delivery, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;"
                 :
                 : "r"(leader_address(delivery)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void leader_store(u64* pointer, u64 value, u64* delivery) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];"
                 :
                 : "r"(leader_address(pointer)), "l"(value), "r"(leader_address(delivery))
                 : "memory");
}

__device__ __forceinline__ bool is_delivered(u64* delivery) {
    u32 done;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(delivery))
                 : "memory");
    return done;
}

__device__ __forceinline__ void prefetch(const void* pointer, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(pointer), "r"(bytes) : "memory");
}

__device__ __forceinline__ void prefetch_line(const void* pointer) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}
// </cluster>

// ---- scores --------------------------------------------------------------------------------------------------------
// Order of floats as order of integers; -0.0 as 0.0.
__device__ __forceinline__ u32 key_of(float score) {
    u32 bits = __float_as_uint(score + 0.0f);
    return bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float score_of(u32 key) {
    return __uint_as_float((key & 0x80000000u) ? key ^ 0x80000000u : ~key);
}

// A word of the buffer.
__device__ __forceinline__ u64 word_of(float score, int position) {
    return (static_cast<u64>(static_cast<u32>(position)) << 32) | __float_as_uint(score);
}

__device__ __forceinline__ float word_score(u64 word) { return __uint_as_float(static_cast<u32>(word)); }

__device__ __forceinline__ int word_position(u64 word) { return static_cast<int>(word >> 32); }

// As a word of the buffer. NaN is -inf.
__device__ __forceinline__ u64 row_word(const float* scores, int position) {
    return word_of(fmaxf(__ldg(scores + position), -INFINITE), position);
}

__device__ __forceinline__ float component(const float4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The scores of vector v that belong to the row, as bits.
__device__ __forceinline__ u32 valid_scores(const Row& row, int v) {
    u32 bits = v < row.num_vectors ? 15u : 0u;
    if (v == 0) bits &= 15u << row.lead;
    if (v == row.num_vectors - 1) bits &= 15u >> (4 * row.num_vectors - row.lead - row.length);
    return bits;
}

// The 4 scores of vector v: NaN as -inf, and then NaN for what does not belong to the row.
__device__ __forceinline__ void unpack(float* x, const float4& vector, const Row& row, int v) {
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = fmaxf(component(vector, j), -INFINITE);
    if (static_cast<u32>(v - 1) >= static_cast<u32>(max(row.num_vectors - 2, 0))) {
        u32 valid = valid_scores(row, v);
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = valid >> j & 1 ? x[j] : NOT_A_NUMBER;
    }
}

// This thread's of the first `limit` vectors of the row.
template <int THREADS>
__device__ __forceinline__ void load(float4 (&vectors)[HELD / 4], const Row& row, int limit) {
#pragma unroll
    for (int u = 0; u < HELD / 4; u++) {
        int v = u * THREADS + static_cast<int>(threadIdx.x);
        if (v < limit) vectors[u] = __ldg(row.vectors + v);
    }
}

// Vector i of the sample: at equal steps of the first `span`.
__device__ __forceinline__ int sample_vector(int i, int span) {
    return static_cast<int>(static_cast<u64>(static_cast<u32>(i)) * static_cast<u32>(span) / SAMPLE_VECS);
}

template <int THREADS>
__device__ __forceinline__ void load_sample(float4 (&vectors)[HELD / 4], const Row& row, int span) {
#pragma unroll
    for (int e = 0; e < SAMPLE_VECS / THREADS; e++) {
        vectors[e] = __ldg(row.vectors + sample_vector(e * THREADS + threadIdx.x, span));
    }
}

// ---- the k-th score ------------------------------------------------------------------------------------------------
template <class T> __device__ __forceinline__ T warp_scan(T value) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        T other = __shfl_up_sync(ALL, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// Parts of [low, high]; a larger value never has a smaller bin, and the lowest has the first one for itself.
struct Bins {
    float low, high, base, scale;
    int bin; // the one that holds the k-th

    __device__ __forceinline__ void divide() {
        base = fminf(fmaxf(low, -LARGEST), LARGEST);
        scale = fminf(__fdividef(static_cast<float>(BINS - 2), fminf(high - base, 4e37f)), LARGEST);
    }
    __device__ __forceinline__ u32 of(float value) const {
        u32 part = min(__float2uint_rz(fmaf(value - base, scale, 1.0f)), static_cast<u32>(BINS - 1));
        return value > low ? part : 0;
    }
    __device__ __forceinline__ bool holds(float value) const {
        return value >= low && value <= high && of(value) == static_cast<u32>(bin);
    }
    // A value less than one bin from the lowest of bin b, where division can tell bins apart.
    __device__ __forceinline__ bool has_edges() const { return scale < 1e37f; }
    __device__ __forceinline__ float edge(int b) const {
        return b < 1 ? -INFINITE : b >= BINS ? INFINITE : base + static_cast<float>(b - 1) * __fdividef(1.0f, scale);
    }
};

// Which values a histogram is of. The lowest bin of Any may hold NaN.
struct Any {
    static constexpr bool EACH = true;
    __device__ __forceinline__ bool operator()(float) const { return true; }
};
struct Number {
    static constexpr bool EACH = true;
    __device__ __forceinline__ bool operator()(float value) const { return value == value; }
};
struct Inside {
    static constexpr bool EACH = false;
    Bins bins;
    __device__ __forceinline__ bool operator()(float value) const { return bins.holds(value); }
};

template <int EACH> struct __align__(EACH < 4 ? 4 * EACH : 16) Counts { u32 of[EACH]; };

// Spreads values over bins and finds the one that holds the one of the given rank, which becomes its rank in there.
// Returns the number of values in there. each(f) calls f(value, i) for those of this thread; NaN is none.
template <int THREADS, class Each, class Member>
__device__ __forceinline__ int spread(State& s, Each each, Member member, Bins& bins, int& rank) {
    constexpr int WARPS = THREADS / 32, EACH = BINS / THREADS;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid / 32;
    float low = INFINITE, high = -INFINITE;
    each([&](float v, int) {
        if (Member::EACH || member(v)) low = fminf(low, v), high = fmaxf(high, v); // which leave NaN out
    });
    u32 lowest = __reduce_min_sync(ALL, key_of(low)), highest = __reduce_max_sync(ALL, key_of(high));
    if (lane == 0) s.lowest[warp] = lowest, s.highest[warp] = highest;
    if (tid == 0) s.listed = 0;
    __syncthreads();
    bins.low = score_of(__reduce_min_sync(ALL, s.lowest[lane % WARPS]));
    bins.high = score_of(__reduce_max_sync(ALL, s.highest[lane % WARPS]));
    bins.divide();
    each([&](float v, int) {
        if (member(v)) atomicAdd(&s.histogram[bins.of(v)], 1u);
    });
    __syncthreads();
    // The first thread has the best bins. Each leaves its own empty for the next histogram.
    int bottom = BINS - EACH - tid * EACH, sum = 0;
    Counts<EACH>& mine = reinterpret_cast<Counts<EACH>&>(s.histogram[bottom]);
    const Counts<EACH> counts = mine;
    mine = Counts<EACH>{};
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += static_cast<int>(counts.of[i]);
    int inclusive = warp_scan(sum);
    if (lane == 31) s.sums[warp] = inclusive;
    __syncthreads();
    u32 others = lane < warp ? static_cast<u32>(s.sums[lane]) : 0;
    int above = static_cast<int>(__reduce_add_sync(ALL, others)) + inclusive - sum;
    if (above < rank && rank <= above + sum) {
        int bin = -1, inside = 0;
#pragma unroll
        for (int i = EACH - 1; i >= 0; i--) {
            int here = static_cast<int>(counts.of[i]);
            if (bin < 0) {
                if (above + here >= rank) bin = bottom + i, inside = here;
                else above += here;
            }
        }
        s.bin = bin, s.above = above, s.inside = inside;
    }
    __syncthreads();
    bins.bin = s.bin;
    rank -= s.above;
    return s.inside;
}

__device__ __forceinline__ void enlist(State& s, u64 word) {
    u64 key = key_of(word_score(word));
    s.list[atomicAdd(&s.listed, 1)] = key << 32 | static_cast<u32>(~word_position(word));
}

// The choice of the `rank` best on the list. Its position is END where no equal score is left out: not if tied, where
// the list has not all of the equal ones.
template <int THREADS> __device__ __forceinline__ Choice finish(State& s, int rank, bool tied) {
    const int lane = threadIdx.x & 31;
    __syncthreads();
    const int listed = s.listed;
#pragma unroll 1
    for (int c = threadIdx.x / 32; c < listed; c += THREADS / 32) {
        const u64 mine = s.list[c];
        int better = 0;
        bool later = tied;
#pragma unroll 1
        for (int i = lane; i - lane < listed; i += 32) {
            u64 other = i < listed ? s.list[i] : 0;
            better += __popc(__ballot_sync(ALL, other > mine));
            later = later || (other < mine && (other ^ mine) >> 32 == 0);
        }
        later = __any_sync(ALL, later);
        if (lane == 0 && better == rank - 1) s.threshold = later ? mine : (mine | ALL) ^ END;
    }
    __syncthreads();
    u64 threshold = s.threshold;
    return {score_of(static_cast<u32>(threshold >> 32)), static_cast<int>(~static_cast<u32>(threshold))};
}

// The scores a thread holds in registers, those of the first groups of 4.
struct Held {
    const float (&x)[HELD];
    int groups;

    template <class F> __device__ __forceinline__ void operator()(F f) const {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (i / 4 < groups) f(x[i], i);
        }
    }
};

// A thread's part of n scores: those in the buffer, or, where that is null, of a row; or the positions of those equal
// to `tie`, the lowest as the largest value.
template <int THREADS> struct Stored {
    const u64* buffer;
    const float* scores;
    int n;
    bool tied;
    float tie;

    __device__ __forceinline__ u64 word(int i) const { return buffer ? buffer[i] : row_word(scores, i); }

    template <class F> __device__ __forceinline__ void operator()(F f) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += THREADS) {
            float v = word_score(word(i));
            if (tied) v = v == tie ? -static_cast<float>(word_position(word(i))) : NOT_A_NUMBER;
            f(v, i);
        }
    }
};

// The choice of `rank` of n scores, 1 <= rank <= n, any scores whatever: those in the buffer, or, where that is null,
// of a row. NaN in the buffer is none.
template <int THREADS>
__device__ __noinline__ Choice kth(State& s, const u64* buffer, const float* scores, int n, int rank) {
    Stored<THREADS> each = {buffer, scores, n, false, 0.0f};
    Bins bins;
    int inside = spread<THREADS>(s, each, Number(), bins, rank);
    while (inside > FINISH) {
        if (bins.low < bins.high) {
            inside = spread<THREADS>(s, each, Inside{bins}, bins, rank);
        } else {
            each.tied = true, each.tie = bins.low;
            inside = spread<THREADS>(s, each, Number(), bins, rank);
        }
    }
    each([&](float v, int i) {
        if (bins.holds(v)) enlist(s, each.word(i));
    });
    return finish<THREADS>(s, rank, each.tied);
}

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

// This block's part comes from memory while the sample is looked at: 16 KiB a thread, 128 KiB at most.
template <int CLUSTER> __device__ __forceinline__ void prefetch_part(const Row& row) {
    const int part = static_cast<int>(blockIdx.x % CLUSTER), tid = threadIdx.x;
    int first = first_vector<CLUSTER>(row, part) + 1024 * tid, end = first_vector<CLUSTER>(row, part + 1);
    if (tid < 8 && first < end) prefetch(row.vectors + first, 16u * static_cast<u32>(min(end - first, 1024)));
}

// Appends the scores of vectors [begin, end) that are at least `bound`, which is above -inf.
template <int THREADS>
__device__ __forceinline__ void
stream(State& s, u64* buffer, int capacity, const Row& row, int begin, int end, float bound) {
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
        slot = __shfl_sync(ALL, slot, 31);
        if (slot + __shfl_sync(ALL, inclusive, 31) > capacity) continue;
        u64* next = buffer + slot + inclusive - mine;
        const int first = 4 * start + row.position<THREADS>(0);
#pragma unroll
        for (int i = 0; i < 4 * UNROLL; i++) {
            if (reached >> i & 1) *next++ = word_of(component(x[i / 4], i % 4), first + i / 4 * 4 * THREADS + i % 4);
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
template <int THREADS, int CLUSTER>
__device__ __forceinline__ int gather(State& s, u64* buffer, int capacity, const Row& row, float bound, int k) {
    const int part = static_cast<int>(blockIdx.x % CLUSTER);
    const bool bounded = bound > -INFINITE;
    if (CLUSTER > 1) cluster_arrive(); // the buffer no longer has the sample, and the count is 0
    if (bounded) {
        int begin = first_vector<CLUSTER>(row, part), end = first_vector<CLUSTER>(row, part + 1);
        stream<THREADS>(s, buffer, capacity, row, begin, end, bound);
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
        while (!is_delivered(&s.delivery)) continue;
    }
    int n = s.count;
    __syncthreads();
    return bounded && n >= k && n <= capacity ? n : careful<THREADS>(s, buffer, capacity, row, k);
}

// ---- output --------------------------------------------------------------------------------------------------------
// Writes position_of(i) for i < k; -1 is none.
template <int THREADS, class Positions>
__device__ __forceinline__ void put(const Request& request, Positions position_of) {
    const int k = request.k, shift = request.page_shift;
    if (request.output == POSITIONS) {
#pragma unroll 2
        for (int i = threadIdx.x; i < k; i += THREADS) reinterpret_cast<long long*>(request.out)[i] = position_of(i);
        return;
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < k; i += THREADS) {
        int slot = position_of(i);
        if (request.pages && slot >= 0) {
            // Of an int64 the lower half: slots are int32.
            int page = __ldg(reinterpret_cast<const int*>(request.pages) + (slot >> shift << request.long_pages));
            slot = page << shift | (slot & ((1 << shift) - 1));
        }
        reinterpret_cast<int*>(request.out)[i] = slot;
    }
}

// A row of no more than k scores: all of them.
template <int THREADS> __device__ __forceinline__ void put_all(const Request& request, int length) {
    if (request.output != MASK) {
        put<THREADS>(request, [&](int i) { return i < length ? i : -1; });
        return;
    }
#pragma unroll 1
    for (int w = threadIdx.x; w < (request.columns + 31) / 32; w += THREADS) {
        int count = min(max(length - 32 * w, 0), 32);
        reinterpret_cast<u32*>(request.out)[w] = count == 32 ? ALL : (1u << count) - 1;
    }
}

__device__ __forceinline__ int count_bits(u32 bits) { return __popc(bits); }
__device__ __forceinline__ int count_bits(u64 bits) { return __popcll(bits); }

// bits[u] of the block's threads stand for WIDTH positions from first + u * THREADS * WIDTH on, and those of the next
// thread for the next. Writes the positions of the bits that are set, ascending, to ordered[written..]; in all they are
// at most BINS. Returns how many they are.
template <int THREADS, int WIDTH, class Bits>
__device__ __forceinline__ int order(State& s, const Bits (&bits)[4], int first, int* ordered, int written) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    u64 counts = 0; // 16 bits for each u
#pragma unroll
    for (int u = 0; u < 4; u++) counts |= static_cast<u64>(static_cast<u32>(count_bits(bits[u]))) << 16 * u;
    u64 inclusive = warp_scan(counts);
    if (lane == 31) s.wide_sums[warp] = inclusive;
    __syncthreads();
    u64 others = lane < THREADS / 32 ? s.wide_sums[lane] : 0;
    u32 low = static_cast<u32>(others), high = static_cast<u32>(others >> 32);
    u64 total = static_cast<u64>(__reduce_add_sync(ALL, high)) << 32 | __reduce_add_sync(ALL, low);
    if (lane >= warp) low = high = 0;
    u64 before = static_cast<u64>(__reduce_add_sync(ALL, high)) << 32 | __reduce_add_sync(ALL, low);
    before += inclusive - counts;
    int all = 0;
#pragma unroll
    for (int u = 0; u < 4; u++) {
        int slot = written + all + static_cast<int>(before >> 16 * u & 0xffffu), position = first + u * THREADS * WIDTH;
        all += static_cast<int>(total >> 16 * u & 0xffffu);
        if (WIDTH == 4) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                if (bits[u] >> j & 1) ordered[slot++] = position + j;
            }
        } else {
            for (u64 left = bits[u]; left; left &= left - 1) {
                ordered[slot++] = position + __ffsll(static_cast<long long>(left)) - 1;
            }
        }
    }
    return all;
}

// Bit i of `taken`: score i that this thread holds of a row in registers.
template <int THREADS>
__device__ __forceinline__ void put_short(State& s, u32 taken, const Row& row, const Request& request) {
    const int tid = threadIdx.x, first = row.position<THREADS>(0);
    const u32 bits[4] = {taken & 15, taken >> 4 & 15, taken >> 8 & 15, taken >> 12};
    if (request.output != MASK) {
        order<THREADS, 4>(s, bits, first, reinterpret_cast<int*>(s.histogram), 0);
        return;
    }
#pragma unroll
    for (int u = 0; u < 4; u++) {
        // The histogram is empty, and becomes the mask. Positions before the row have no bits.
        int position = first + 4 * u * THREADS;
        u64 both = static_cast<u64>(bits[u]) << (position & 31);
        u32 *word = s.histogram + (position >> 5), low = static_cast<u32>(both), high = static_cast<u32>(both >> 32);
        if (low) atomicOr(word, low);
        if (high) atomicOr(word + 1, high);
    }
    __syncthreads();
#pragma unroll 1
    for (int w = tid; w < (request.columns + 31) / 32; w += THREADS) {
        reinterpret_cast<u32*>(request.out)[w] = w < HELD * THREADS / 32 ? s.histogram[w] : 0;
    }
}

// Bit i of `taken`: word i that this thread holds of the buffer. map: MAP_WORDS<THREADS>.
template <int THREADS> constexpr int MAP_WORDS = 8 * THREADS;

template <int THREADS>
__device__ __forceinline__ void
put_long(State& s, u32* map, const u64* buffer, u32 taken, int length, const Request& request) {
    constexpr int WINDOW = MAP_WORDS<THREADS>;
    const int tid = threadIdx.x, words = ((request.output == MASK ? request.columns : length) + 31) / 32;
    u64* pairs = reinterpret_cast<u64*>(map);
    for (int window = 0, written = 0; window < words; window += WINDOW) {
        __syncthreads();
#pragma unroll
        for (int u = 0; u < 4; u++) pairs[u * THREADS + tid] = 0;
        __syncthreads();
        for (u32 left = taken; left; left &= left - 1) {
            int i = __ffs(static_cast<int>(left)) - 1;
            int position = word_position(buffer[i * THREADS + tid]), word = position / 32 - window;
            if (word >= 0 && word < WINDOW) atomicOr(&map[word], 1u << (position & 31));
        }
        __syncthreads();
        if (request.output == MASK) {
#pragma unroll 1
            for (int w = tid; w < min(words - window, WINDOW); w += THREADS) {
                reinterpret_cast<u32*>(request.out)[window + w] = map[w];
            }
            continue;
        }
        u64 bits[4];
#pragma unroll
        for (int u = 0; u < 4; u++) bits[u] = pairs[u * THREADS + tid];
        written += order<THREADS, 64>(s, bits, 32 * window + 64 * tid, reinterpret_cast<int*>(s.histogram), written);
    }
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

// CAPACITY: words of the buffer, 0 where no row is longer than what the registers hold.
template <int THREADS, int CLUSTER, int CAPACITY>
__device__ __forceinline__ void
topk(State& s, u32* map, u64* buffer, Row row, float4 (&vectors)[HELD / 4], int span, const Request& request) {
    static_assert(CAPACITY == 0 || CAPACITY >= BINS + 4 * THREADS, "the best so far and one step must fit");
    static_assert(CAPACITY <= HELD * THREADS, "the buffer's words go to registers");
    constexpr int SAMPLED = SAMPLE_VECS / THREADS;
    const int tid = threadIdx.x, part = static_cast<int>(blockIdx.x % CLUSTER), k = request.k;
    const bool is_short = CAPACITY == 0 || row.num_vectors <= HELD / 4 * THREADS;
    if (is_short && part != 0) return;
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
        if (CLUSTER > 1) prefetch_part<CLUSTER>(row);
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
        n = gather<THREADS, CLUSTER>(s, buffer, CAPACITY, row, bound, k);
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
template <int THREADS, int CLUSTER, int CAPACITY>
__device__ __forceinline__ void begin(
    const float* logits, long long stride, const long long* lengths, long long pages_stride, int num_queries,
    Request request
) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ State s;
    u32* map = reinterpret_cast<u32*>(shared);
    u64* buffer = reinterpret_cast<u64*>(map + MAP_WORDS<THREADS>);
    const int tid = threadIdx.x, r = static_cast<int>(blockIdx.x / CLUSTER);
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
    if (CLUSTER > 1 && tid == 0) expect_senders(&s.delivery, CLUSTER - 1);
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
        topk<THREADS, CLUSTER, CAPACITY>(s, map, buffer, row, vectors, span, request);
    } else if (blockIdx.x % CLUSTER == 0) {
        put_all<THREADS>(request, row.length);
    }
}

#define KERNEL(NAME, THREADS, CLUSTER, CAPACITY, BLOCKS, ATTRIBUTE)                                                    \
    extern "C" __global__ void ATTRIBUTE __launch_bounds__(THREADS, BLOCKS) NAME(                                      \
        const float* logits, long long stride, int columns, const long long* lengths, int k, int output, char* out,    \
        int row_bytes, const char* pages, long long pages_stride, int num_queries, int page_shift, int long_pages      \
    ) {                                                                                                                \
        Request request = {out, pages, output, columns, k, row_bytes, page_shift, long_pages};                         \
        begin<THREADS, CLUSTER, CAPACITY>(logits, stride, lengths, pages_stride, num_queries, request);                \
    }

// Rows of up to 16 scores a thread
KERNEL(topk_short_256, 256, 1, 0, 5, )
KERNEL(topk_short_512, 512, 1, 0, 3, )
KERNEL(topk_short_1024, 1024, 1, 0, 1, )
// and longer ones, in one block or more.
KERNEL(topk_by_1, 512, 1, 8192, 2, )
KERNEL(topk_by_2, 512, 2, 8192, 2, __cluster_dims__(2, 1, 1))
KERNEL(topk_by_4, 512, 4, 8192, 2, __cluster_dims__(4, 1, 1))
KERNEL(topk_by_8, 512, 8, 8192, 2, __cluster_dims__(8, 1, 1))
