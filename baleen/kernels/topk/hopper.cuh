// What CUDA C++ has no word for without headers: programmatic launches, barriers in shared memory, bulk copies, clusters.
// Inline PTX for compute capability 9.0 and newer.

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

// As pdl.begin(): waits until all kernels before have ended, then lets the next start up.
__device__ __forceinline__ void begin_after_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void prefetch_line(const void* pointer) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// ---- barriers: a phase ends when `arrivals` have arrived and all bytes that they announced are there ---------------
__device__ __forceinline__ void init_barrier(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Whether the phase has ended that is the first (parity 0), the second (1), the third (0), ...
__device__ __forceinline__ bool is_complete(u64* barrier, u32 parity) {
    u32 done;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    return done;
}

// ---- bulk copies to this block's shared memory, of multiples of 16 bytes -------------------------------------------
// The only arrival of a phase. What is read once leaves the L2 cache first: lines that other kernels wrote would have
// to go to memory to make room for it.
__device__ __forceinline__ void copy_once(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
    asm volatile("{\n.reg .b64 first;\n"
                 "createpolicy.fractional.L2::evict_first.b64 first, 1.0;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1], %2, [%3], first;\n}"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// ---- clusters: blocks that reach each other's shared memory --------------------------------------------------------
// Without a fence, which costs as much as all that a cluster does: what one block wrote is not ordered for the others.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

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

// Arrives at the first block's barrier, and announces what leader_store() brings.
__device__ __forceinline__ void announce(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;"
                 :
                 : "r"(leader_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void leader_store(u64* pointer, u64 value, u64* barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];"
                 :
                 : "r"(leader_address(pointer)), "l"(value), "r"(leader_address(barrier))
                 : "memory");
}
