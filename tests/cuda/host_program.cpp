// Runs the kernel body on the host against the oracle; prints the first difference and exits
// with 1. Every gradient has memory of its own to the byte, so that ASan sees any step outside.
#include <sys/mman.h>

#include "host_launcher.h"
#include "host_oracle.h"

namespace {

using namespace host;

uint64_t random_state = 1;
uint32_t random_bits() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(random_state >> 33);
}
double random_value() { return (static_cast<double>(random_bits()) - 1073741824.0) / 268435456.0; }

void check(bool holds, const char* what, int64_t detail = 0) {
  if (holds) return;
  std::fprintf(stderr, "host_program: %s (%lld)\n", what, static_cast<long long>(detail));
  std::exit(1);
}

// A buffer that begins `offset` bytes behind a multiple of 16 and ends where its memory ends.
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t offset) : base_(new char[offset + bytes]), offset_(offset) {}
  void* data() const { return base_.get() + offset_; }

 private:
  std::unique_ptr<char[]> base_;
  int64_t offset_;
};

void put(void* data, DType dtype, int64_t i, double value) {
  const int bytes = oracle::bytes_of(dtype);
  char* to = static_cast<char*>(data) + i * bytes;
  const float single = static_cast<float>(value);
  const _Float16 half = static_cast<_Float16>(value);
  const uint16_t brain = oracle::nearest_bfloat16(single);
  switch (dtype) {
    case DType::kFloat64:
      std::memcpy(to, &value, bytes);
      break;
    case DType::kFloat32:
      std::memcpy(to, &single, bytes);
      break;
    case DType::kFloat16:
      std::memcpy(to, &half, bytes);
      break;
    default:
      std::memcpy(to, &brain, bytes);
  }
}

// Parameters with memory of their own.
class Call {
 public:
  Call(DType dtype, DType out_dtype, int64_t num_towers)
      : dtype_(dtype), out_dtype_(out_dtype), num_towers_(num_towers) {}

  // `misaligned`: the tower whose gradient lies `offset` bytes off, num_towers for out, -1 for
  // none. `aliased`: the tower whose gradient is out itself, -1 for none.
  void add(int64_t numel, int64_t misaligned, int64_t offset, int64_t aliased = -1) {
    std::vector<const void*>& grads = grads_.emplace_back(num_towers_);
    const auto make = [&](DType dtype, bool off) {
      buffers_.emplace_back(numel * oracle::bytes_of(dtype), off ? offset : 0);
      return buffers_.back().data();
    };
    for (int64_t tower = 0; tower < num_towers_; ++tower) {
      void* data = make(dtype_, tower == misaligned);
      // Zeros of every tower are negative, and so is their sum.
      for (int64_t i = 0; i < numel; ++i) put(data, dtype_, i, i % 9 == 4 ? -0.0 : random_value());
      grads[tower] = data;
    }
    void* out = aliased >= 0 ? const_cast<void*>(grads[aliased])
                             : make(out_dtype_, misaligned == num_towers_);
    parameters.push_back({out, nullptr, numel, dtype_, out_dtype_});
  }

  void run_unchecked(const Towers& towers, const Statistics* statistics) {
    connect();
    launch(parameters, towers, statistics);
  }

  void run(const Towers& towers) {
    connect();
    std::vector<std::vector<char>> expected;
    for (const Parameter& parameter : parameters) {
      expected.push_back(oracle::expected_out(parameter, towers));
    }
    launch(parameters, towers);
    for (size_t p = 0; p < parameters.size(); ++p) {
      check(expected[p].empty() ||
                std::memcmp(parameters[p].out, expected[p].data(), expected[p].size()) == 0,
            "the mean's bits differ from the oracle's at parameter", static_cast<int64_t>(p));
    }
  }

  void set(int64_t parameter, int64_t tower, int64_t i, double value) {
    put(const_cast<void*>(grads_[parameter][tower]), dtype_, i, value);
  }
  double get(int64_t parameter, int64_t tower, int64_t i) const {
    return oracle::value_at(grads_[parameter][tower], dtype_, i);
  }

  std::vector<Parameter> parameters;

 private:
  void connect() {
    for (size_t p = 0; p < parameters.size(); ++p) parameters[p].grads = grads_[p].data();
  }

  DType dtype_;
  DType out_dtype_;
  int64_t num_towers_;
  std::vector<std::vector<const void*>> grads_;
  std::vector<Buffer> buffers_;
};

std::vector<double> some_weights(int64_t num_towers) {
  std::vector<double> weights;
  for (int64_t tower = 0; tower < num_towers; ++tower) weights.push_back(0.1 + 0.37 * tower);
  return weights;
}

// Every tail, with each tower and out misaligned in turn, and whole chunks with a tail.
void add_shapes(Call& call, const Group& group, int64_t num_towers) {
  const int bytes = element_bytes(group.dtype);
  const int64_t chunk = chunk_numel(bytes);
  for (int64_t tail = 0; tail < 16; ++tail) {
    const int64_t misaligned = tail % (num_towers + 2) - 1;
    const int out_bytes = oracle::bytes_of(group.out_dtype);
    const int64_t step = misaligned == num_towers ? out_bytes : bytes;
    call.add(tail, misaligned, step * (1 + tail % (16 / step - 1)));
    call.add(32 + tail, -1, 0);
  }
  for (int64_t tower = -1; tower <= num_towers; ++tower) {
    call.add(chunk + 5, tower, tower == num_towers ? oracle::bytes_of(group.out_dtype) : bytes);
  }
  call.add(2 * chunk, -1, 0);
  if (group.dtype == group.out_dtype) {
    call.add(chunk - 3, -1, 0, 0);
    call.add(chunk + 16, -1, 0, num_towers - 1);
  }
}

void check_means() {
  for (const Group& group : kGroups) {
    for (const int64_t num_towers : {1, 2, 3, 4, 8, 17}) {
      const std::vector<double> weights = some_weights(num_towers);
      for (const Rule rule : {Rule::kSum, Rule::kMean, Rule::kWeighted}) {
        Call call(group.dtype, group.out_dtype, num_towers);
        add_shapes(call, group, num_towers);
        call.run({num_towers, rule, weights.data()});
      }
    }
  }
}

// Sums of squares to float32's rounding of a thread's share, counts exactly; non-finite values,
// squares outside float32's range and zeros among them.
void check_statistics() {
  const int64_t num_towers = 3;
  for (const Group& group : kGroups) {
    Call call(group.dtype, group.out_dtype, num_towers);
    add_shapes(call, group, num_towers);
    const int64_t large = static_cast<int64_t>(call.parameters.size());
    call.add(6000, -1, 0);
    call.add(6000, -1, 0);
    for (int64_t i = 0; i < 6000; ++i) {
      call.set(large, 0, i, i % 2 == 0 ? 3e30 : 1.0);
      call.set(large, 1, i, 1e-30);
      call.set(large, 2, i, 0);
    }
    call.set(large + 1, 0, 5, NAN);
    call.set(large + 1, 0, 4999, INFINITY);
    call.set(large + 1, 2, 17, -INFINITY);
    const int64_t count = static_cast<int64_t>(call.parameters.size());
    std::vector<double> expected(num_towers * count);
    std::vector<int64_t> expected_non_finite(num_towers * count);
    for (int64_t at = 0; at < num_towers * count; ++at) {
      for (int64_t i = 0; i < call.parameters[at % count].numel; ++i) {
        const double value = call.get(at % count, at / count, i);
        expected[at] += value * value;
        expected_non_finite[at] += std::isfinite(value) ? 0 : 1;
      }
    }
    std::vector<double> squares(num_towers * count);
    std::vector<int64_t> non_finite(num_towers * count);
    std::vector<double> out_squares(count);
    const Statistics statistics{squares.data(), non_finite.data(), out_squares.data()};
    // The NaN of the last parameter has any bits, so that only its statistics are compared.
    const auto close = [](double a, double b) {
      return (std::isnan(a) && std::isnan(b)) || a == b || std::fabs(a - b) <= 4e-7 * b;
    };
    call.run_unchecked({num_towers, Rule::kMean, nullptr}, &statistics);
    for (int64_t at = 0; at < num_towers * count; ++at) {
      check(close(squares[at], expected[at]), "a sum of squares is off", at);
      check(non_finite[at] == expected_non_finite[at], "a count of non-finite values is off", at);
    }
    for (int64_t p = 0; p + 2 < count; ++p) {
      double sum = 0;
      for (int64_t i = 0; i < call.parameters[p].numel; ++i) {
        const double value =
            oracle::value_at(call.parameters[p].out, call.parameters[p].out_dtype, i);
        sum += value * value;
      }
      const double tolerance = group.out_dtype == DType::kBFloat16  ? 9e-3
                               : group.out_dtype == DType::kFloat16 ? 1.1e-3
                                                                    : 4e-7;
      check(std::fabs(sum - out_squares[p]) <= tolerance * sum, "the mean's squares are off", p);
    }
  }
}

// Chunks follow each other from 0 to numel, and vectors begin on whole vectors.
void check_chunks() {
  for (int round = 0; round < 20000; ++round) {
    const int bytes = 2 << round % 3;
    const bool aligned = random_bits() % 2 == 0;
    const int64_t numel =
        round % 50 == 0 ? (int64_t{1} << 32) + random_bits() % 100000 : random_bits() % 30000;
    const int64_t count = num_chunks(numel, aligned, bytes);
    int64_t end = 0;
    for (int64_t index = 0; index < count;
         index = count - index > 100 && index > 3 ? count - 3 : index + 1) {
      const Chunk chunk = chunk_at(index, numel, aligned, bytes);
      if (index < 4 || count <= 100) check(chunk.begin == end, "a chunk begins elsewhere", index);
      check(chunk.numel > 0 && chunk.numel <= chunk_numel(bytes), "a chunk's size", chunk.numel);
      const bool whole =
          chunk.begin % vector_numel(bytes) == 0 && chunk.numel % vector_numel(bytes) == 0;
      check(!chunk.vectorised || (aligned && whole), "a vectorised chunk is not whole", index);
      check(chunk.vectorised || !aligned || chunk.numel < vector_numel(bytes),
            "an aligned chunk goes by single elements", index);
      end = chunk.begin + chunk.numel;
    }
    check(end == numel, "the chunks end elsewhere", numel);
  }
}

// Thousands of parameters in as few launches as the argument's size allows, each in one of them.
template <int kBytes>
void check_packing(int64_t num_towers, int64_t count) {
  const std::vector<const void*> grads(num_towers);
  std::vector<Parameter> parameters;
  for (int64_t p = 0; p < count; ++p) {
    parameters.push_back({nullptr, grads.data(), p % 7, DType::kFloat16, DType::kFloat16});
  }
  const auto arguments = std::make_unique<Arguments<kBytes>>();
  std::vector<int> packed(count);
  int64_t launches = 0;
  for (int64_t begin = 0; begin < count; ++launches) {
    begin = pack(parameters.data(), count, begin, kGroups[2], {num_towers, Rule::kSum, nullptr},
                 false, arguments.get());
    for (int entry = 0; entry < arguments->header.num_entries; ++entry) {
      ++packed[arguments->entry(entry).index];
    }
  }
  int64_t filled = 0;
  for (int64_t p = 0; p < count; ++p) {
    check(packed[p] == (p % 7 == 0 ? 0 : 1), "a parameter is not packed once", p);
    filled += packed[p];
  }
  const int64_t capacity = max_entries(num_towers, kBytes);
  check(launches == (filled + capacity - 1) / capacity, "the number of launches", launches);
}

// More than 2^31 elements, of whose untouched pages the system backs none.
void check_large_index() {
  const int64_t numel = (int64_t{1} << 32) + 4096 * 3 + 7;
  const int64_t bytes = numel * 2;
  const auto map = [&] {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(data != MAP_FAILED, "no address space for a large parameter");
    return static_cast<uint16_t*>(data);
  };
  uint16_t* tensors[3] = {map(), map(), map()};
  const void* grads[2] = {tensors[0], tensors[1]};
  const Parameter parameter{tensors[2], grads, numel, DType::kBFloat16, DType::kBFloat16};
  const auto arguments = std::make_unique<Arguments<kSmallBytes>>();
  pack(&parameter, 1, 0, kGroups[4], {2, Rule::kSum, nullptr}, false, arguments.get());
  const uint32_t chunks = arguments->header.num_chunks;
  check(chunks == (numel - 7) / 4096 + 1, "chunks of a large parameter", chunks);
  for (const int64_t i : {(int64_t{1} << 31) + 1, (int64_t{1} << 32) + 3, numel - 8, numel - 1}) {
    tensors[0][i] = 0x3f80;  // 1.0
    tensors[1][i] = 0x4000;  // 2.0
    run_plain_block<DType::kBFloat16>(*arguments, i == numel - 1 ? chunks - 1 : i / 4096);
    check(tensors[2][i] == 0x4040, "an element beyond 2^31 is not averaged", i);
  }
  for (uint16_t* data : tensors) munmap(data, bytes);
}

}  // namespace

int main() {
  check_chunks();
  check_means();
  check_statistics();
  check_packing<kSmallBytes>(4, 2000);
  check_packing<kLargeBytes>(4, 2000);
  check_packing<kSmallBytes>(kMaxTowers, 6);
  check_large_index();
  return 0;
}
