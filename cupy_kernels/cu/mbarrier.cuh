// Barriers in shared memory (sm_90a), for warps that copy and warps that multiply, and copies that arrive there.
//
// A phase of a barrier ends when `arrivals` threads have arrived and all bytes have come that were announced in it. The
// next phase then begins at once. What a thread did before it arrived is seen by those who wait for the end of that
// phase. Phases have parity 0, 1, 0, 1, ...: mbarrier_wait(barrier, 0) returns when the first phase has ended, and
// mbarrier_wait(barrier, 1) at once while it has not. So a thread that waits must not be two phases behind.
#pragma once

struct MBarrier { unsigned long long state; };

// By one thread, before a fence_async_proxy() of wgmma.cuh and a barrier of all that use it. Its bytes are then the
// barrier's until the block ends.
__device__ inline void mbarrier_init(MBarrier& barrier, int arrivals) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::mbarrier_init(&barrier, arrivals);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned at = (unsigned)__cvta_generic_to_shared(&barrier);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
#endif
}

// bytes: what bulk copies of this phase will bring, announced by this arrival.
__device__ inline void mbarrier_arrive(MBarrier& barrier, int bytes = 0) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::mbarrier_arrive(&barrier, bytes);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned at = (unsigned)__cvta_generic_to_shared(&barrier);
    if (bytes) asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
    else asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
#endif
}

// Until the youngest phase of this parity has ended.
__device__ inline void mbarrier_wait(MBarrier& barrier, int parity) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::mbarrier_wait(&barrier, parity);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned at = (unsigned)__cvta_generic_to_shared(&barrier);
    asm volatile(
        "{.reg .pred ended; again: mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1; @!ended bra again;}" ::"r"(
            at),
        "r"(parity)
        : "memory");
#endif
}

// One thread copies `bytes`, a multiple of 16, as are both addresses; they arrive at `barrier`, which must have been
// told of them by mbarrier_arrive() in the same phase. Needs no fence_async_proxy() before wgmma reads them. Somebody
// must wait for them before the block ends.
__device__ inline void bulk_copy(void* shared, const void* global, int bytes, MBarrier& barrier) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::bulk_copy(shared, global, bytes, &barrier);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned to = (unsigned)__cvta_generic_to_shared(shared), at = (unsigned)__cvta_generic_to_shared(&barrier);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "l"(global), "r"(bytes), "r"(at)
        : "memory");
#endif
}

// A warpgroup gives registers back, or takes some, so that each thread has REGISTERS, a multiple of 8.
template <int REGISTERS> __device__ __forceinline__ void fewer_registers() {
#if !defined(CUPY_KERNELS_EMULATOR) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
template <int REGISTERS> __device__ __forceinline__ void more_registers() {
#if !defined(CUPY_KERNELS_EMULATOR) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
