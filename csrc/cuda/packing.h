// From the parameters of a call to the arguments of its launches. Host code without CUDA: a test
// can run it anywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "arguments.h"
#include "tower_mean.h"

namespace torchtower::cuda {

constexpr int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Parameters of one launch agree in these.
struct Group {
  DType dtype;
  DType out_dtype;

  bool contains(const Parameter& parameter) const {
    return parameter.dtype == dtype && parameter.out_dtype == out_dtype;
  }
};

constexpr Group kGroups[] = {
    {DType::kFloat32, DType::kFloat32},   {DType::kFloat64, DType::kFloat64},
    {DType::kFloat16, DType::kFloat16},   {DType::kFloat16, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32},
};

inline int64_t count_of(const Group& group, const Parameter* parameters, int64_t num_parameters) {
  int64_t count = 0;
  for (int64_t index = 0; index < num_parameters; ++index) {
    count += group.contains(parameters[index]) ? 1 : 0;
  }
  return count;
}

// One tower off the 16 bytes takes the whole parameter off the vectorised path.
inline bool is_aligned(const Parameter& parameter, int64_t num_towers) {
  uint64_t bits = reinterpret_cast<uint64_t>(parameter.out);
  for (int64_t tower = 0; tower < num_towers; ++tower) {
    bits |= reinterpret_cast<uint64_t>(parameter.grads[tower]);
  }
  return bits % kVectorBytes == 0;
}

inline uint64_t weight_word(const Towers& towers, int64_t tower, DType dtype) {
  // A sum and a mean multiply by one, which changes no bit.
  const double weight = towers.rule == Rule::kWeighted ? towers.weights[tower] : 1.0;
  uint64_t word = 0;
  if (dtype == DType::kFloat64) {
    std::memcpy(&word, &weight, sizeof(weight));
  } else {
    const float rounded = static_cast<float>(weight);
    std::memcpy(&word, &rounded, sizeof(rounded));
  }
  return word;
}

// Appends one parameter as the next entry. The grid cannot overflow: 2^31 chunks are 16 TB of
// gradients.
template <int kBytes>
void append(const Parameter& parameter, int64_t index, Arguments<kBytes>* arguments) {
  Header& header = arguments->header;
  const bool aligned = is_aligned(parameter, header.num_towers);
  const Entry entry{header.num_chunks, aligned, static_cast<uint32_t>(index), parameter.numel,
                    parameter.out};
  uint64_t* words =
      arguments->words + header.num_towers + header.num_entries * arguments->entry_words();
  std::memcpy(words, &entry, sizeof(entry));
  std::memcpy(words + kEntryWords, parameter.grads, header.num_towers * sizeof(void*));
  ++header.num_entries;
  header.num_chunks +=
      static_cast<uint32_t>(num_chunks(parameter.numel, aligned, element_bytes(parameter.dtype)));
}

// Packs the parameters of `group` from `begin` on, as many as the argument holds; returns the index
// at which the next launch begins. Empty parameters only matter to statistics, which are zeros for
// them.
template <int kBytes>
int64_t pack(const Parameter* parameters, int64_t num_parameters, int64_t begin, const Group& group,
             const Towers& towers, bool with_empty, Arguments<kBytes>* arguments) {
  const double divisor = towers.rule == Rule::kMean ? static_cast<double>(towers.count) : 1.0;
  arguments->header = {0, static_cast<int32_t>(towers.count), 0, group.out_dtype == DType::kFloat32,
                       divisor};
  for (int64_t tower = 0; tower < towers.count; ++tower) {
    arguments->words[tower] = weight_word(towers, tower, group.dtype);
  }
  const int capacity = max_entries(towers.count, kBytes);
  int64_t index = begin;
  for (; index < num_parameters && arguments->header.num_entries < capacity; ++index) {
    const Parameter& parameter = parameters[index];
    if (group.contains(parameter) && (with_empty || parameter.numel > 0)) {
      append(parameter, index, arguments);
    }
  }
  return index;
}

}  // namespace torchtower::cuda
