// NVRTC alone takes it: memory of its own (malloc), instructions on parts of words, and what only asm needs.
;; float* p = (float*)malloc(16); free(p);
;; y[0] = __vadd4(u, u);
;; y[0] = __cvta_generic_to_shared(pf);
;; cudaError_t e = cudaSuccess;
;; y[0] = __CUDA_ARCH__;
__managed__ float managed; ;; y[0] = managed;
