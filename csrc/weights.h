// The normal form of a call's weights, as tower_mean.h describes it. No torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tower_mean.h"

namespace torchtower {

struct NormalWeights {
  Rule rule;
  std::vector<int64_t> towers_read;  // the caller's indices of the towers that are read
  std::vector<double> weights;       // theirs
};

// Why these are no weights, or an empty string.
std::string describe_bad_weights(const std::vector<double>& weights);

NormalWeights normalise(const std::vector<double>& weights);

}  // namespace torchtower
