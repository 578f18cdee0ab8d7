// NVRTC alone takes it: memory of its own (malloc, new), rare functions, votes without a mask (for which GPUs of today
// have no instruction), std::initializer_list, and functions in place of CUDA's own other than min and max.
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
__device__ float sqrt(float v) { return sqrtf(v); } ;; y[0] = sqrt(f);
