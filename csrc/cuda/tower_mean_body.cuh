// What one block does: average one chunk of one parameter over all towers.
//
// Needs CUDA's names (threadIdx, __fmul_rn, ...) and intrinsics.cuh's but includes neither, so that
// a host compiler can run this very text over stand-ins.
#pragma once

#include <cstdint>
#include <cstring>

#include "arguments.h"
#include "numerics.cuh"
#include "squares.cuh"

namespace torchtower::cuda {

// A thread's share of a chunk. Vectorised, its v-th vector is the (v * kThreads + thread)-th of the
// chunk; otherwise its i-th element is the (i * kThreads + thread)-th: neighbouring threads touch
// neighbouring memory either way.
template <class Bits, bool kVectorised>
struct Share {
  static constexpr int kNumel = thread_numel(sizeof(Bits));
  static constexpr int kLanes = vector_numel(sizeof(Bits));

  // Elements past the end of the chunk become zero bits, which are 0.0 in every dtype.
  static __device__ __forceinline__ void load(const Bits* chunk, int numel, Bits (&bits)[kNumel]) {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kVectorised) {
#pragma unroll
      for (int i = 0; i < kNumel; i += kLanes) {
        const int element = i * kThreads + thread * kLanes;
        uint4 words = make_uint4(0, 0, 0, 0);
        if (element < numel) {
          words = *reinterpret_cast<const uint4*>(chunk + element);
        }
        memcpy(&bits[i], &words, sizeof(words));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kNumel; ++i) {
        const int element = i * kThreads + thread;
        bits[i] = element < numel ? chunk[element] : Bits(0);
      }
    }
  }

  // OutBits may be wider than Bits: a vector of half gradients is stored as two of float32.
  template <class OutBits>
  static __device__ __forceinline__ void store(OutBits* chunk, int numel,
                                               const OutBits (&bits)[kNumel]) {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kVectorised) {
      constexpr int kOutLanes = vector_numel(sizeof(OutBits));
#pragma unroll
      for (int i = 0; i < kNumel; i += kOutLanes) {
        const int element = (i - i % kLanes) * kThreads + thread * kLanes + i % kLanes;
        if (element < numel) {
          uint4 words;
          memcpy(&words, &bits[i], sizeof(words));
          *reinterpret_cast<uint4*>(chunk + element) = words;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kNumel; ++i) {
        const int element = i * kThreads + thread;
        if (element < numel) {
          chunk[element] = bits[i];
        }
      }
    }
  }
};

// The plain op's recorder. Statistics record rows 0..T-1 of the towers and row T of the mean.
struct NoRecorder {
  static constexpr bool kRecords = false;
  __device__ void record(int, const Partial&) {}
};

// The unrolled counts are powers of two, and there a product with the inverse rounds the very
// number that a division rounds.
template <int kTowers, class Sum>
__device__ __forceinline__ Sum divide_by_count(Sum sum, Sum count) {
  if constexpr (kTowers > 0) {
    static_assert((kTowers & (kTowers - 1)) == 0, "other counts must be divided by");
    return multiply(sum, Sum(1.0 / kTowers));
  } else {
    return divide(sum, count);
  }
}

template <DType kDType, bool kVectorised, class Sum, int kNumel>
__device__ __forceinline__ void store_mean(const Entry& entry, bool out_float32, const Chunk& chunk,
                                           const Sum (&sums)[kNumel]) {
  using Bits = typename Numerics<kDType>::Bits;
  using ThreadShare = Share<Bits, kVectorised>;
  if constexpr (sizeof(Bits) == 2) {
    if (out_float32) {
      ThreadShare::store(static_cast<float*>(entry.out) + chunk.begin, chunk.numel, sums);
      return;
    }
  }
  Bits bits[kNumel];
#pragma unroll
  for (int i = 0; i < kNumel; ++i) {
    bits[i] = Numerics<kDType>::narrow(sums[i]);
  }
  ThreadShare::store(static_cast<Bits*>(entry.out) + chunk.begin, chunk.numel, bits);
}

template <DType kDType, bool kVectorised, int kTowers, class Recorder, int kBytes>
__device__ __forceinline__ void average_chunk(const Arguments<kBytes>& arguments, int index,
                                              const Chunk& chunk, Recorder& recorder) {
  using Bits = typename Numerics<kDType>::Bits;
  using Sum = typename Numerics<kDType>::Sum;
  using ThreadShare = Share<Bits, kVectorised>;
  constexpr int kNumel = ThreadShare::kNumel;
  [[maybe_unused]] constexpr int kUnrolled = kTowers > 0 && kVectorised ? kTowers : 1;
  const int num_towers = kTowers > 0 ? kTowers : arguments.header.num_towers;

  // Negative zero is the identity of addition, of -0.0 too: the first tower is no special case.
  Sum sums[kNumel];
#pragma unroll
  for (int i = 0; i < kNumel; ++i) {
    sums[i] = Sum(-0.0);
  }

#pragma unroll kUnrolled
  for (int tower = 0; tower < num_towers; ++tower) {
    const Bits* grad = reinterpret_cast<const Bits*>(arguments.grad(index, tower)) + chunk.begin;
    Sum weight;
    memcpy(&weight, &arguments.words[tower], sizeof(weight));
    Bits bits[kNumel];
    ThreadShare::load(grad, chunk.numel, bits);
    Sum values[kNumel];
#pragma unroll
    for (int i = 0; i < kNumel; ++i) {
      values[i] = Numerics<kDType>::widen(bits[i]);
      sums[i] = add(sums[i], multiply(weight, values[i]));
    }
    if constexpr (Recorder::kRecords) {
      recorder.record(tower, squares(values));
    }
  }

  const Sum divisor = static_cast<Sum>(arguments.header.divisor);
  if (divisor != Sum(1)) {
#pragma unroll
    for (int i = 0; i < kNumel; ++i) {
      sums[i] = divide_by_count<kTowers>(sums[i], divisor);
    }
  }
  if constexpr (Recorder::kRecords) {
    recorder.record(num_towers, squares(sums));
  }
  // Every gradient of these elements has been read by this same thread, so out may be any of them.
  store_mean<kDType, kVectorised>(arguments.entry(index), arguments.header.out_float32 != 0, chunk,
                                  sums);
}

template <DType kDType, int kTowers, class Recorder, int kBytes>
__device__ __forceinline__ void average_block(const Arguments<kBytes>& arguments,
                                              Recorder& recorder) {
  const int index = arguments.find_entry(blockIdx.x);
  const Entry entry = arguments.entry(index);
  const Chunk chunk = chunk_at(blockIdx.x - entry.first_chunk, entry.numel, entry.aligned != 0,
                               sizeof(typename Numerics<kDType>::Bits));
  if (chunk.vectorised) {
    average_chunk<kDType, true, kTowers>(arguments, index, chunk, recorder);
  } else {
    average_chunk<kDType, false, kTowers>(arguments, index, chunk, recorder);
  }
}

}  // namespace torchtower::cuda
