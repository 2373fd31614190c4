// ptxcheck's CUDA runtime, which runs the PTX of a library that is loaded after it, and what its
// own interface leaves out: which lines of which kernels were never reached, and launch counts.
#include "cudart_shim.cpp"

extern "C" const char* runtime_kernels() { return V ? pc_kernels(V) : ""; }
extern "C" const char* runtime_never_run(const char* kernel) { return pc_cover(V, kernel); }
extern "C" unsigned long long runtime_instructions() { return V ? V->icount : 0; }
