// One call on the CPU: cut, spread over threads, and its statistics put together. No torch.
#pragma once

#include "kernels.h"

namespace torchtower::cpu {

// Calls body(begin, end, context) on ranges that cover [0, count) once, on any threads, and returns
// when all are done. It does not pay to wake a thread for fewer than `grain`.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

// `statistics` may be null; else its arrays hold zeros, and are added to.
void tower_mean(const Parameter* parameters, int64_t num_parameters, const Towers& towers,
                const Statistics* statistics, ParallelFor parallel_for);

}  // namespace torchtower::cpu
