#include "weights.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <string>

namespace torchtower {

std::string describe_bad_weights(const std::vector<double>& weights) {
  if (weights.empty()) return "expected a weight for each tower, but got none";
  for (size_t t = 0; t < weights.size(); ++t) {
    // Most dtypes are multiplied in float32, where a larger one would be infinite.
    if (!(weights[t] >= 0 && weights[t] <= std::numeric_limits<float>::max())) {
      std::ostringstream message;
      message << "expected every weight to be at least 0 and finite in float32, but tower " << t
              << "'s is " << weights[t];
      return message.str();
    }
  }
  if (std::all_of(weights.begin(), weights.end(), [](double w) { return w == 0; })) {
    return "expected a tower with a weight above 0, but all " + std::to_string(weights.size()) +
           " weights are 0";
  }
  return "";
}

NormalWeights normalise(const std::vector<double>& weights) {
  NormalWeights normal{Rule::kWeighted, {}, {}};
  for (size_t t = 0; t < weights.size(); ++t) {
    if (weights[t] == 0) continue;
    normal.towers_read.push_back(static_cast<int64_t>(t));
    normal.weights.push_back(weights[t]);
  }
  const auto all_are = [&](double value) {
    return std::all_of(normal.weights.begin(), normal.weights.end(),
                       [=](double w) { return w == value; });
  };
  if (all_are(1.0)) {
    normal.rule = Rule::kSum;
  } else if (all_are(1.0 / static_cast<double>(normal.weights.size()))) {
    normal.rule = Rule::kMean;
  }
  return normal;
}

}  // namespace torchtower
