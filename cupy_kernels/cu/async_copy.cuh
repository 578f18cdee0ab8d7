// Copies from global to shared memory that run behind the arithmetic: cp.async on sm_80 and newer, plain copies before.
//
// A thread issues copies, closes a group of them by cp_async_commit(), and sees its own copies after
// cp_async_wait<N>(), which leaves at most the N youngest groups in flight; the other threads of the block see them
// after a __syncthreads() that follows.
#pragma once

// 16 bytes, both addresses multiples of 16. Not valid: writes zeros, and `global` is not read.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::copy_async(shared, global, 16, valid);
#elif __CUDA_ARCH__ >= 800
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
        : "memory");
#else
    *(uint4*)shared = valid ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
#endif
}

// 4 bytes, both addresses multiples of 4, likewise.
__device__ inline void cp_async_4(void* shared, const void* global, bool valid) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::copy_async(shared, global, 4, valid);
#elif __CUDA_ARCH__ >= 800
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(valid ? 4 : 0) : "memory");
#else
    *(unsigned*)shared = valid ? *(const unsigned*)global : 0;
#endif
}

__device__ inline void cp_async_commit() {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::copy_commit();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int PENDING_GROUPS> __device__ inline void cp_async_wait() {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::copy_wait(PENDING_GROUPS);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING_GROUPS) : "memory");
#endif
}
