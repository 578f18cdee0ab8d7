// NVRTC alone takes it: memory of its own (malloc, new), instructions on parts of words, what only asm needs, votes
// without a mask (for which GPUs of today have no instruction), and std::initializer_list.
;; float* p = (float*)malloc(16); free(p);
;; y[0] = __vadd4(u, u);
;; y[0] = __cvta_generic_to_shared(pf);
;; cudaError_t e = cudaSuccess;
__managed__ float managed; ;; y[0] = managed;
;; float* p = new float[4]; delete[] p;
;; y[0] = __all(f);
;; y[0] = __ballot(f);
;; y[0] = __isnan(f);
;; auto v = {1, 2};
;; cudaStream_t s;
;; y[0] = __vmaxs2(u, u);
;; __prof_trigger(1);
;; y[0] = __isLocal(&i);
