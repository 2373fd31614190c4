// The argument of one launch of the averaging kernel: which chunk of which parameter a block
// averages. Torch-free, CUDA-free and shared by the host, which packs it, and the device, which
// reads it.
//
// Everything travels by value in the launch itself: no table in device memory, so nothing is
// allocated or copied before the kernel and a captured CUDA graph holds all it needs.
//
//   words: [0, T)          the weights, each in the accumulator's own type
//          then per entry  [Entry | T gradient pointers], T + 3 words
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TORCHTOWER_HOST_DEVICE __host__ __device__
#else
#define TORCHTOWER_HOST_DEVICE
#endif

namespace torchtower::cuda {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;  // one LDG.E.128
// What a thread holds of each tower: 4 vectors, or 2 of half types, which widen to as many sums.
constexpr int kThreadBytesWide = 64;
constexpr int kThreadBytesHalf = 32;

// How many bytes of arguments a launch may carry: 4 KB everywhere, 32,764 bytes from sm_70 on with
// a driver of CUDA 12.1 or later. The statistics kernels take 48 bytes of pointers beside them.
constexpr int kSmallBytes = 4096 - 48;
constexpr int kLargeBytes = 32760 - 48;

// The elements that a block averages, and those that one 128-bit load brings.
TORCHTOWER_HOST_DEVICE constexpr int vector_numel(int element_bytes) {
  return kVectorBytes / element_bytes;
}
TORCHTOWER_HOST_DEVICE constexpr int thread_numel(int element_bytes) {
  return (element_bytes == 2 ? kThreadBytesHalf : kThreadBytesWide) / element_bytes;
}
TORCHTOWER_HOST_DEVICE constexpr int chunk_numel(int element_bytes) {
  return kThreads * thread_numel(element_bytes);
}

// A stretch of one parameter, wholly of 128-bit loads or wholly of single elements.
struct Chunk {
  int64_t begin;
  int32_t numel;
  bool vectorised;
};

// An aligned parameter is cut into vectorised chunks and, where it does not end with a whole
// vector, a last chunk of single elements; an unaligned one is single elements throughout.
TORCHTOWER_HOST_DEVICE inline int64_t vectorised_numel(int64_t numel, bool aligned,
                                                       int element_bytes) {
  return aligned ? numel - numel % vector_numel(element_bytes) : 0;
}

TORCHTOWER_HOST_DEVICE inline int64_t num_chunks(int64_t numel, bool aligned, int element_bytes) {
  const int64_t chunk = chunk_numel(element_bytes);
  const int64_t vectorised = vectorised_numel(numel, aligned, element_bytes);
  return (vectorised + chunk - 1) / chunk + (numel - vectorised + chunk - 1) / chunk;
}

TORCHTOWER_HOST_DEVICE inline Chunk chunk_at(int64_t index, int64_t numel, bool aligned,
                                             int element_bytes) {
  const int64_t chunk = chunk_numel(element_bytes);
  const int64_t vectorised = vectorised_numel(numel, aligned, element_bytes);
  const int64_t vectorised_chunks = (vectorised + chunk - 1) / chunk;
  const bool is_vectorised = index < vectorised_chunks;
  const int64_t begin =
      is_vectorised ? index * chunk : vectorised + (index - vectorised_chunks) * chunk;
  const int64_t left = (is_vectorised ? vectorised : numel) - begin;
  return {begin, static_cast<int32_t>(left < chunk ? left : chunk), is_vectorised};
}

// One parameter in a launch. Its gradients' pointers follow it.
struct Entry {
  uint32_t first_chunk;  // the block that averages its first chunk
  uint32_t aligned : 1;  // out and every tower's gradient lie on 16 bytes
  uint32_t index : 31;   // among the parameters of the call, where its statistics go
  int64_t numel;
  void* out;
};
static_assert(sizeof(Entry) == 24, "an entry is three words");
constexpr int kEntryWords = 3;

struct Header {
  int32_t num_entries;
  int32_t num_towers;
  uint32_t num_chunks;   // the grid
  uint32_t out_float32;  // half types: out holds float32
  double divisor;        // of the sum; 1 unless the rule is kMean
};

template <int kBytes>
struct Arguments {
  static constexpr int kWords = (kBytes - static_cast<int>(sizeof(Header))) / 8;

  Header header;
  uint64_t words[kWords];

  TORCHTOWER_HOST_DEVICE int entry_words() const { return header.num_towers + kEntryWords; }
  TORCHTOWER_HOST_DEVICE Entry entry(int index) const {
    Entry entry;
    memcpy(&entry, words + header.num_towers + index * entry_words(), sizeof(entry));
    return entry;
  }
  TORCHTOWER_HOST_DEVICE uint64_t grad(int index, int tower) const {
    return words[header.num_towers + index * entry_words() + kEntryWords + tower];
  }

  // The entry whose chunks include `block`: the last that starts at or before it. Of entries that
  // start together only the last has any chunks.
  TORCHTOWER_HOST_DEVICE int find_entry(uint32_t block) const {
    int low = 0;
    int high = header.num_entries;
    do {
      const int middle = (low + high) / 2;
      if (entry(middle).first_chunk <= block) {
        low = middle;
      } else {
        high = middle;
      }
    } while (high - low > 1);
    return low;
  }
};

constexpr int max_entries(int64_t num_towers, int bytes) {
  const int64_t words = (bytes - static_cast<int64_t>(sizeof(Header))) / 8;
  return static_cast<int>(num_towers <= words ? (words - num_towers) / (num_towers + kEntryWords)
                                              : 0);
}

// The most towers of which one parameter fits the smallest argument.
constexpr int kMaxTowers = 250;
static_assert(max_entries(kMaxTowers, kSmallBytes) == 1 &&
                  max_entries(kMaxTowers + 1, kSmallBytes) == 0,
              "kMaxTowers is what the smallest argument holds");

}  // namespace torchtower::cuda
