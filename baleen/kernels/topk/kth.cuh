// Scores, and the k-th of those that a block holds: a histogram between the extremes tells the bin of the k-th, and each
// score of that bin is compared with each. If they are too many, kth() gives that bin a histogram of its own, and so on;
// scores that are all equal are told apart by a histogram of their positions.

#pragma once

#include "hopper.cuh"

constexpr int BINS = 2048;        // also the largest k: the output is put in order in the histogram's place
constexpr int FINISH = 256;       // scores of a bin that are compared each with each
constexpr int SAMPLE_VECS = 1024; // groups of 4 neighbours
constexpr int UNROLL = 4;         // vectors of 4 scores that a thread takes at once
constexpr int STAGES = 4;         // of a ring
constexpr int HELD = 16;          // scores a thread holds
constexpr u32 ALL = 0xffffffffu;
constexpr int END = 0x7fffffff;   // after any position
#define INFINITE __uint_as_float(0x7f800000u)
#define NOT_A_NUMBER __uint_as_float(0x7fc00000u)
#define LARGEST 3.4028234e38f

struct State {
    __align__(16) u32 histogram[BINS]; // empty when nothing is being counted
    u64 list[FINISH];                  // as large as the score is good, then the position's complement
    u64 threshold, delivery, arrived[STAGES];
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
