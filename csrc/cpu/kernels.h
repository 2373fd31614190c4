// The CPU kernels of one instruction set, and the choice among them at run time. No torch.
#pragma once

#include <cstdint>

#include "../tower_mean.h"

namespace torchtower::cpu {

// What one piece adds to the statistics; arrays over the towers read.
struct PieceStatistics {
  double* sum_of_squares;
  int64_t* non_finite;
  double* out_sum_of_squares;
};

// Each works on elements [begin, end) of a parameter, which may be anywhere in memory and of any
// number; the bits of a result depend on neither.
struct Kernels {
  const char* name;
  // `stream`: write past the cache (see executor.cpp for when that pays).
  void (*mean)(const Parameter& parameter, int64_t begin, int64_t end, const Towers& towers,
               bool stream);
  void (*mean_with_statistics)(const Parameter& parameter, int64_t begin, int64_t end,
                               const Towers& towers, const PieceStatistics& statistics);
};

// Run on every machine.
extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

// The best that this machine has, unless use_kernels has said otherwise.
const Kernels& kernels();

// Names the instruction sets that this machine can run, the best first, null at the end.
const char* const* available_kernels();

// For tests. False, and nothing changed, for a name that is not available.
bool use_kernels(const char* name);

}  // namespace torchtower::cpu
