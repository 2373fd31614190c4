// The CPU kernels by themselves, without torch or Python: for sanitizers, and for machines that are
// only emulated. Works through every dtype, many numbers of towers, misaligned and tiny parameters,
// in place and not, with and without statistics, and prints a digest of all results' bits.
//
//   cpu_kernel_main KERNELS THREADS
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "../../csrc/cpu/executor.h"

namespace {

using namespace torchtower;

int num_threads = 1;

void parallel_for(int64_t count, int64_t, cpu::Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < num_threads; ++i) {
    const int64_t begin = count * i / num_threads;
    const int64_t end = count * (i + 1) / num_threads;
    threads.emplace_back([=] { body(begin, end, context); });
  }
  for (std::thread& thread : threads) thread.join();
}

struct Format {
  DType dtype;
  DType out_dtype;
  int64_t size;
  int64_t out_size;
};

constexpr Format kFormats[] = {
    {DType::kFloat32, DType::kFloat32, 4, 4}, {DType::kFloat64, DType::kFloat64, 8, 8},
    {DType::kFloat16, DType::kFloat16, 2, 2}, {DType::kBFloat16, DType::kBFloat16, 2, 2},
    {DType::kFloat16, DType::kFloat32, 2, 4}, {DType::kBFloat16, DType::kFloat32, 2, 4},
};

// A tensor's memory, exactly as large as its elements so that a sanitizer sees one byte beyond.
// `shift` elements are left out in front, so that addresses are not aligned for vectors.
class Buffer {
 public:
  Buffer(int64_t numel, int64_t size, int64_t shift)
      : bytes_(new unsigned char[(numel + shift) * size]()), data_(bytes_.get() + shift * size) {}
  unsigned char* data() const { return data_; }

 private:
  std::unique_ptr<unsigned char[]> bytes_;
  unsigned char* data_;
};

uint64_t next_random() {
  static uint64_t state = 88172645463325252u;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

// Numbers near 1, and now and then a subnormal, a huge one or an infinity. Any bits of a 16-bit
// format may come but a NaN's, whose payload is not promised.
void fill(unsigned char* to, DType dtype, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) {
    const uint64_t random = next_random();
    const bool is_rare = random % 97 == 0;
    const double near_one =
        static_cast<double>(static_cast<int64_t>(random >> 11)) / (1LL << 52) - 1;
    if (dtype == DType::kFloat64) {
      const double value = is_rare ? near_one * 1e-310 : near_one;
      std::memcpy(to + 8 * i, &value, 8);
    } else if (dtype == DType::kFloat32) {
      const auto scale = is_rare ? (random & 64 ? 1e-40f : 3e38f) : 1.0f;
      const float value = static_cast<float>(near_one) * scale;
      std::memcpy(to + 4 * i, &value, 4);
    } else {
      const uint16_t exponent = dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
      auto bits = static_cast<uint16_t>(random >> 20);
      if ((bits & exponent) == exponent)
        bits &= static_cast<uint16_t>(is_rare ? 0x8000 | exponent : ~0x4000);
      std::memcpy(to + 2 * i, &bits, 2);
    }
  }
}

class Digest {
 public:
  void add_bits(uint64_t bits) { value_ = (value_ ^ bits) * 1099511628211u; }
  void add(double number) {
    uint64_t bits = 0;
    std::memcpy(&bits, &number, sizeof(bits));
    add_bits(std::isnan(number) ? 1 : bits);
  }
  void add(const unsigned char* data, DType dtype, int64_t numel) {
    for (int64_t i = 0; i < numel; ++i) {
      if (dtype == DType::kFloat64) {
        double number = 0;
        std::memcpy(&number, data + 8 * i, 8);
        add(number);
      } else if (dtype == DType::kFloat32) {
        float number = 0;
        std::memcpy(&number, data + 4 * i, 4);
        add(number);
      } else {
        const uint16_t exponent = dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
        uint16_t bits = 0;
        std::memcpy(&bits, data + 2 * i, 2);
        const bool is_nan = (bits & exponent) == exponent && (bits & ~exponent & 0x7fff) != 0;
        add_bits(is_nan ? 1 : bits);
      }
    }
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 14695981039346656037u;
};

void run(const Format& format, int64_t count, Rule rule, bool in_place, bool with_statistics,
         Digest& digest) {
  const int64_t numels[] = {0, 1, 5, 16, 31, 67, 130, 1025, count <= 3 ? 33000 : 300};
  std::vector<Buffer> buffers;
  std::vector<const void*> grads;
  std::vector<Parameter> parameters;
  for (const int64_t numel : numels) {
    for (int64_t t = 0; t < count; ++t) {
      buffers.emplace_back(numel, format.size, (t + numel) % 4);
      fill(buffers.back().data(), format.dtype, numel);
      grads.push_back(buffers.back().data());
    }
    if (!in_place) buffers.emplace_back(numel, format.out_size, numel % 3);
    auto* const out = in_place ? const_cast<void*>(grads[grads.size() - 1 - numel % count])
                               : buffers.back().data();
    parameters.push_back({out, nullptr, numel, format.dtype, format.out_dtype});
  }
  const auto num = static_cast<int64_t>(parameters.size());
  for (int64_t p = 0; p < num; ++p) parameters[p].grads = grads.data() + p * count;
  std::vector<double> weights;
  for (int64_t t = 0; t < count; ++t) weights.push_back(0.1 + 0.3 * static_cast<double>(t));
  std::vector<double> squares(count * num), out_squares(num);
  std::vector<int64_t> non_finite(count * num);
  const Statistics statistics = {squares.data(), non_finite.data(), out_squares.data()};
  cpu::tower_mean(parameters.data(), num, {count, rule, weights.data()},
                  with_statistics ? &statistics : nullptr, &parallel_for);
  for (const Parameter& parameter : parameters) {
    digest.add(static_cast<const unsigned char*>(parameter.out), format.out_dtype, parameter.numel);
  }
  for (const double value : squares) digest.add(value);
  for (const double value : out_squares) digest.add(value);
  for (const int64_t value : non_finite) digest.add_bits(static_cast<uint64_t>(value));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || !cpu::use_kernels(argv[1])) {
    std::fprintf(stderr, "usage: cpu_kernel_main KERNELS THREADS; this machine has:");
    for (const char* const* name = cpu::available_kernels(); *name != nullptr; ++name) {
      std::fprintf(stderr, " %s", *name);
    }
    std::fprintf(stderr, "\n");
    return 2;
  }
  num_threads = std::atoi(argv[2]);
  Digest digest;
  for (const Format& format : kFormats) {
    for (const int64_t count : {1, 2, 3, 4, 5, 6, 7, 8, 9, 17}) {
      for (const Rule rule : {Rule::kSum, Rule::kMean, Rule::kWeighted}) {
        for (const bool in_place : {false, true}) {
          if (in_place && format.dtype != format.out_dtype) continue;
          for (const bool with_statistics : {false, true}) {
            run(format, count, rule, in_place, with_statistics, digest);
          }
        }
      }
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(digest.value()));
  return 0;
}
