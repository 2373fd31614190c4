// What the kernel should compute, written from the contract of csrc/tower_mean.h alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tower_mean.h"

namespace oracle {

using torchtower::DType;
using torchtower::Parameter;
using torchtower::Rule;
using torchtower::Towers;

inline int bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <class T>
T read_as(const void* data, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + i * sizeof(T), sizeof(T));
  return value;
}

inline double bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline double value_at(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64:
      return read_as<double>(data, i);
    case DType::kFloat32:
      return read_as<float>(data, i);
    case DType::kFloat16:
      return read_as<_Float16>(data, i);
    default:
      return bfloat16_value(read_as<uint16_t>(data, i));
  }
}

// The nearest bfloat16, ties to even, found by comparing the two neighbours in float64.
inline uint16_t nearest_bfloat16(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  const uint16_t below = wide >> 16;
  if (std::isnan(value)) return 0x7fff;
  if (std::isinf(value)) return below;
  const uint16_t above = below + 1;  // away from zero
  const double infinity_as = std::ldexp(1.0, 128);
  const double upper = std::isinf(bfloat16_value(above))
                           ? std::copysign(infinity_as, bfloat16_value(above))
                           : bfloat16_value(above);
  const double to_below = std::fabs(value - bfloat16_value(below));
  const double to_above = std::fabs(upper - value);
  if (to_below == to_above) return below % 2 == 0 ? below : above;
  return to_below < to_above ? below : above;
}

template <class Sum>
Sum mean_at(const Parameter& parameter, const Towers& towers, int64_t i) {
  Sum sum = 0;
  for (int64_t tower = 0; tower < towers.count; ++tower) {
    Sum term = static_cast<Sum>(value_at(parameter.grads[tower], parameter.dtype, i));
    if (towers.rule == Rule::kWeighted) term = static_cast<Sum>(towers.weights[tower]) * term;
    sum = tower == 0 ? term : sum + term;
  }
  return towers.rule == Rule::kMean ? sum / static_cast<Sum>(towers.count) : sum;
}

// The expected bytes of out.
inline std::vector<char> expected_out(const Parameter& parameter, const Towers& towers) {
  const int bytes = bytes_of(parameter.out_dtype);
  std::vector<char> out(parameter.numel * bytes);
  const auto put = [&](int64_t i, auto value) { std::memcpy(&out[i * bytes], &value, bytes); };
  for (int64_t i = 0; i < parameter.numel; ++i) {
    if (parameter.dtype == DType::kFloat64) {
      put(i, mean_at<double>(parameter, towers, i));
      continue;
    }
    const float mean = mean_at<float>(parameter, towers, i);
    switch (parameter.out_dtype) {
      case DType::kFloat32:
        put(i, mean);
        break;
      case DType::kFloat16:
        put(i, static_cast<_Float16>(mean));
        break;
      default:
        put(i, nearest_bfloat16(mean));
    }
  }
  return out;
}

}  // namespace oracle
