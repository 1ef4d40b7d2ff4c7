// The winners of a row as positions, slots or a bitmask. They are bits in order of position; counting bits gives each its
// place in the output.

#pragma once

#include "kth.cuh"

enum Output { POSITIONS, SLOTS, MASK };

struct Request {
    char* out;         // of this row
    const char* pages; // of this row's request; null: positions are slots
    int output, columns, k, row_bytes, page_shift;
    int long_pages;    // 1: int64, 0: int32
};

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
