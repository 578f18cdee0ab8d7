// The emulator alone takes it: a C++ compiler for the host does not tell functions of the host from those of the device.
// So a text that is not the package's is compiled by NVRTC, too, where there is one.
int host(int v) { return v * v; } ;; y[0] = host(2);
constexpr int host(int v) { return v * v; } ;; y[0] = host(2);
struct S { float a; S(float a) : a(a) {} }; ;; y[0] = S(f).a;
int global = 5; ;; y[0] = global;
;; auto g = [](auto v) { return v + 1; }; y[0] = g(1);
;; __shared__ float s[2] = {1, 2}; y[0] = s[0];
;; y[0] = __GNUC__;
;; auto g = [=] __device__ (float v) { return v; }; y[0] = g(f);
;; y[0] = __COUNTER__;
__constant__ int cc = 3; ;; cc = 4;
;; float v = 1e40f; y[0] = v;
;; [[nodiscard]] int k = 1; y[0] = k;
