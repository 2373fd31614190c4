// The real launcher behind a C interface, for a library that ptxcheck's CUDA runtime runs.
#include <vector>

#include "cuda/tower_mean.cu"

using torchtower::DType;
using torchtower::Parameter;
using torchtower::Rule;
using torchtower::Statistics;
using torchtower::Towers;

// `grads`: [num_parameters, num_towers]. `statistics` and `scratch` may be null.
extern "C" int entry_tower_mean(int64_t num_parameters, int64_t num_towers, void* const* outs,
                                const void* const* grads, const int64_t* numels,
                                const int8_t* dtypes, const int8_t* out_dtypes, int rule,
                                const double* weights, const Statistics* statistics, void* scratch,
                                int driver_version) {
  std::vector<Parameter> parameters;
  for (int64_t p = 0; p < num_parameters; ++p) {
    parameters.push_back({outs[p], grads + p * num_towers, numels[p], static_cast<DType>(dtypes[p]),
                          static_cast<DType>(out_dtypes[p])});
  }
  const Towers towers{num_towers, static_cast<Rule>(rule), weights};
  return torchtower::cuda::launch_tower_mean(parameters.data(), num_parameters, towers, statistics,
                                             scratch, driver_version, nullptr);
}

extern "C" int64_t entry_scratch_bytes(int64_t num_parameters, int64_t num_towers,
                                       void* const* outs, const void* const* grads,
                                       const int64_t* numels, const int8_t* dtypes) {
  std::vector<Parameter> parameters;
  for (int64_t p = 0; p < num_parameters; ++p) {
    const DType dtype = static_cast<DType>(dtypes[p]);
    parameters.push_back({outs[p], grads + p * num_towers, numels[p], dtype, dtype});
  }
  return torchtower::cuda::scratch_bytes(parameters.data(), num_parameters,
                                         {num_towers, Rule::kSum, nullptr});
}
