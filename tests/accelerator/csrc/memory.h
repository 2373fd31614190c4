// Device memory: host memory that remembers its device. Copies between devices are counted.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <array>
#include <mutex>
#include <vector>

#include "devices.h"

namespace simulated {

inline std::array<std::atomic<int64_t>, kMaxDevices> live_bytes{};
inline std::array<std::atomic<int64_t>, kMaxDevices> peak_bytes{};

inline void account(c10::DeviceIndex index, int64_t bytes) {
  const int64_t now = live_bytes[index] += bytes;
  int64_t peak = peak_bytes[index];
  while (now > peak && !peak_bytes[index].compare_exchange_weak(peak, now)) {
  }
}

// What a storage's pointer stands for: memory of its own, or the memory of a CPU storage that a
// kernel has filled.
struct Block {
  c10::DeviceIndex index;
  int64_t bytes;
  c10::DataPtr memory;
  c10::Storage adopted;
};

inline c10::DataPtr own(Block* block, void* data) {
  account(block->index, block->bytes);
  const auto release = [](void* context) {
    auto* dead = static_cast<Block*>(context);
    account(dead->index, -dead->bytes);
    delete dead;
  };
  return {data, block, release, c10::Device(kType, block->index)};
}

inline c10::DataPtr adopt(const c10::Storage& cpu, c10::DeviceIndex index) {
  const auto bytes = static_cast<int64_t>(cpu.nbytes());
  void* data = cpu.mutable_data();
  return own(new Block{index, bytes, {}, cpu}, data);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes);
    void* data = memory.get();
    return own(new Block{current_index, static_cast<int64_t>(bytes), std::move(memory), {}}, data);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

inline DeviceAllocator allocator;

class CopyCounts {
 public:
  // Each row: source, destination, copies, bytes; the CPU is device -1.
  std::vector<int64_t> rows() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> flat;
    for (const auto& [way, count] : counts_) {
      flat.insert(flat.end(), {way.first, way.second, count.first, count.second});
    }
    return flat;
  }
  void reset() {
    const std::lock_guard<std::mutex> lock(mutex_);
    counts_.clear();
  }
  void add(const c10::Device& from, const c10::Device& to, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& count = counts_[{from.is_cpu() ? -1 : from.index(), to.is_cpu() ? -1 : to.index()}];
    count.first += 1;
    count.second += bytes;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int64_t, int64_t>, std::pair<int64_t, int64_t>> counts_;
};

inline CopyCounts copies;

// Which device a new tensor goes to, until the guard is left.
class OnDevice {
 public:
  explicit OnDevice(c10::Device device) : before_(current_index) {
    set_current(resolve(device).index());
  }
  ~OnDevice() { current_index = before_; }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  c10::DeviceIndex before_;
};

inline void check_options(std::optional<c10::Layout> layout, std::optional<bool> pin_memory) {
  TORCH_CHECK_NOT_IMPLEMENTED(c10::layout_or_default(layout) == c10::kStrided,
                              "simulated tensors are strided");
  TORCH_CHECK(!c10::pinned_memory_or_default(pin_memory), "only CPU tensors can be pinned");
}

inline at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype,
                        std::optional<c10::Layout> layout, std::optional<c10::Device> device,
                        std::optional<bool> pin_memory, std::optional<c10::MemoryFormat> format) {
  check_options(layout, pin_memory);
  const OnDevice guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

inline at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                                std::optional<c10::ScalarType> dtype,
                                std::optional<c10::Layout> layout,
                                std::optional<c10::Device> device, std::optional<bool> pin_memory) {
  check_options(layout, pin_memory);
  const OnDevice guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

inline void grow(c10::StorageImpl* storage, size_t bytes) {
  const OnDevice guard(storage->device());
  c10::DataPtr fresh = allocator.allocate(bytes);
  allocator.copy_data(fresh.get(), storage->data(), std::min(bytes, storage->nbytes()));
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
}

inline const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size,
                                 std::optional<c10::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() != size) impl->set_sizes_contiguous(size);
  if (format && *format != c10::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  const size_t bytes = at::detail::computeStorageNbytes(self.sizes(), self.strides(),
                                                        self.itemsize(), self.storage_offset());
  if (bytes > self.storage().nbytes()) grow(self.storage().unsafeGetStorageImpl(), bytes);
  return self;
}

inline at::Tensor& set_storage_(at::Tensor& self, at::Storage storage, int64_t offset,
                                c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.data() == nullptr) {
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride);
  }
  const size_t bytes =
      at::detail::computeStorageNbytes(self.sizes(), self.strides(), self.itemsize(), offset);
  if (bytes > self.storage().nbytes()) grow(self.storage().unsafeGetStorageImpl(), bytes);
  return self;
}

inline at::Tensor& set_whole_storage_(at::Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage_(self, std::move(storage), 0, {count}, {});
}

inline at::Tensor& set_tensor_(at::Tensor& self, const at::Tensor& source) {
  return set_storage_(self, source.storage(), source.storage_offset(), source.sizes(),
                      source.strides());
}

inline at::Tensor& set_empty_(at::Tensor& self) {
  const OnDevice guard(self.device());
  return set_storage_(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, &allocator, true), 0,
                      {0}, {});
}

}  // namespace simulated
