// NVRTC alone takes it: memory of its own (malloc, new), rare functions, votes without a mask (for which GPUs of today
// have no instruction), std::initializer_list, a switch that jumps over an initial value, functions in place of CUDA's
// own other than min and max, and PTX, which the emulator's compiler refuses behind all other errors.
;; float* p = (float*)malloc(16); free(p);
;; cudaError_t e = cudaSuccess;
__managed__ float managed; ;; y[0] = managed;
;; float* p = new float[4]; delete[] p;
;; y[0] = __all(f);
;; y[0] = __ballot(f);
;; y[0] = __isnan(f);
;; auto v = {1, 2};
;; cudaStream_t s;
;; __prof_trigger(1);
;; y[0] = __isConstant(&i);
;; y[0] = __vavgu4(u, u);
;; y[0] = __vabs2(u) + __vsads2(u, u);
;; y[0] = __vabs4(u);
;; y[0] = __vneg4(u);
;; y[0] = __vsads4(u, u);
;; y[0] = __vhaddu4(u, u);
;; y[0] = __fns(u, 0, 1);
;; __barrier_sync(0);
;; __barrier_sync_count(0, 64);
;; switch (i) { case 0: int k = 1; y[0] = k; break; default: y[0] = 0; }
__device__ float sqrt(float v) { return sqrtf(v); } ;; y[0] = sqrt(f);
;; unsigned n; asm("mov.u32 %0, 1;" : "=r"(n)); y[0] = n;
;; unsigned v; asm volatile("mov.u32 %0, %laneid;" : "=r"(v)); y[0] = v;
;; float v; asm("ex2.approx.f32 %0, %1;" : "=f"(v) : "f"(f)); y[0] = v;
;; unsigned v; asm("{.reg .b32 r; mov.b32 r, %1; add.u32 %0, r, 1;}" : "=r"(v) : "r"(i)); y[0] = v;
;; unsigned v; asm("mov.u32 %0, %%laneid;" : "=r"(v)); y[0] = v;
;; double v; asm("{.reg .f64 %%r; mov.f64 %%r, %1; mov.f64 %0, %%r;}" : "=d"(v) : "d"(d)); y[0] = v;
;; unsigned v; asm("mov.u32 %0, %1;" : "=r"(v) : "h"((short)i)); y[0] = v;
