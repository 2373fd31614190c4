// Operators without a kernel of their own run the CPU's on tensors that alias the same memory.
//
// No copy is made either way: arguments become CPU tensors over the same bytes, and what the CPU
// kernel returns is a view of an argument (then the result is that view of the argument), the
// argument itself, or memory that the device adopts. Operators on two devices raise as CUDA's do.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/StorageImpl.h>

#include <unordered_map>

#include "memory.h"
#include "random.h"

namespace simulated {

inline constexpr c10::DispatchKeySet kCarriedKeys{
    c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor};

// A tensor over `storage` with the sizes, strides, dtype and lazy bits of `like`.
inline at::Tensor tensor_over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like,
                              c10::Device device) {
  const auto keys = c10::DispatchKeySet(key) | (like.key_set() & kCarriedKeys);
  at::Tensor made =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  TORCH_INTERNAL_ASSERT(made.device() == device);
  return made;
}

class CpuCall {
 public:
  CpuCall(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t begin) : op_(op) {
    for (size_t i = begin; i < stack.size(); ++i) {
      for_each_tensor(stack[i], [this](const at::Tensor& tensor) { meet(tensor); });
    }
  }

  c10::IValue to_cpu(const c10::IValue& value, const c10::Argument& argument) {
    if (value.isDevice() && value.toDevice().type() == kType) {
      meet_device(resolve(value.toDevice()));
      return c10::Device(c10::kCPU);
    }
    if (draws_on_cpu)
      return map_tensors(value, [this](const at::Tensor& tensor) { return alias(tensor); });
    if (value.isGenerator()) {
      const at::Generator generator = value.toGenerator();
      return generator.device().type() == kType ? cpu_generator_of(generator) : generator;
    }
    if (value.isNone() && takes_generator(argument) && device_) {
      return cpu_generator_of(default_generator(device_->index()));
    }
    return map_tensors(value, [this](const at::Tensor& tensor) { return alias(tensor); });
  }

  c10::IValue to_device(const c10::IValue& value) {
    return map_tensors(value, [this](const at::Tensor& tensor) { return result(tensor); });
  }

  // An argument that the kernel wrote to may have been resized.
  void write_back() {
    for (auto& [original, cpu] : aliased_) {
      auto* storage = original.storage().unsafeGetStorageImpl();
      if (cpu.storage().data() != storage->data()) {
        storage->set_data_ptr_noswap(adopt(cpu.storage(), original.device().index()));
        storage->set_nbytes(cpu.storage().nbytes());
      }
      if (cpu.sizes() != original.sizes() || cpu.strides() != original.strides()) {
        original.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(),
                                                              cpu.storage_offset());
      }
    }
  }

 private:
  template <typename Visit>
  static void for_each_tensor(const c10::IValue& value, Visit visit) {
    if (value.isTensor()) {
      visit(value.toTensor());
    } else if (value.isList()) {
      for (const c10::IValue& item : value.toListRef()) {
        if (item.isTensor()) visit(item.toTensor());
      }
    }
  }

  template <typename Map>
  static c10::IValue map_tensors(const c10::IValue& value, Map map) {
    if (value.isTensor()) return map(value.toTensor());
    if (!value.isTensorList() && !value.isOptionalTensorList()) return value;
    c10::impl::GenericList list(value.toList().elementType());
    for (const c10::IValue& item : value.toListRef()) {
      list.push_back(item.isTensor() ? c10::IValue(map(item.toTensor())) : item);
    }
    return list;
  }

  static bool takes_generator(const c10::Argument& argument) {
    const auto* optional = argument.type()->castRaw<c10::OptionalType>();
    return optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
  }

  void meet(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == kType) {
      meet_device(tensor.device());
    } else if (tensor.dim() > 0 && !cpu_tensors_allowed()) {
      meet_device(tensor.device());
    }
  }

  void meet_device(c10::Device device) {
    if (!device_) device_ = device;
    TORCH_CHECK(*device_ == device,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                *device_, " and ", device, "! (when running ", op_.schema().name(), ")");
  }

  // Indices may be on the CPU, as they may for CUDA tensors.
  bool cpu_tensors_allowed() const {
    return op_.schema().name().find("index") != std::string::npos;
  }

  at::Tensor alias(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kType) return tensor;
    TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == c10::kStrided, "simulated tensors are strided");
    const c10::Storage& storage = tensor.storage();
    auto& cpu = cpu_storages_[storage.unsafeGetStorageImpl()];
    if (!cpu) {
      cpu = c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(),
                         c10::DataPtr(storage.mutable_data(), c10::Device(c10::kCPU)),
                         c10::GetCPUAllocator(), true);
      originals_.emplace(cpu.unsafeGetStorageImpl(), storage);
    }
    at::Tensor made = tensor_over(cpu, c10::DispatchKey::CPU, tensor, c10::Device(c10::kCPU));
    aliased_.emplace_back(tensor, made);
    return made;
  }

  at::Tensor result(const at::Tensor& cpu) {
    if (!cpu.defined() || !cpu.is_cpu()) return cpu;
    TORCH_CHECK_NOT_IMPLEMENTED(cpu.layout() == c10::kStrided, "simulated tensors are strided");
    auto [entry, fresh] = originals_.try_emplace(cpu.storage().unsafeGetStorageImpl());
    if (fresh) {
      const c10::DeviceIndex index = device_ ? device_->index() : current_index;
      entry->second = c10::Storage(c10::Storage::use_byte_size_t(), cpu.storage().nbytes(),
                                   adopt(cpu.storage(), index), &allocator, true);
    }
    return tensor_over(entry->second, c10::DispatchKey::PrivateUse1, cpu, entry->second.device());
  }

  const c10::OperatorHandle& op_;
  std::optional<c10::Device> device_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> cpu_storages_;  // of the arguments
  std::unordered_map<c10::StorageImpl*, c10::Storage> originals_;     // and back
  std::vector<std::pair<at::Tensor, at::Tensor>> aliased_;
};

// Which argument an operator returns as it is, being in-place or having `out`; -1 for none.
inline int returned_argument(const c10::FunctionSchema& schema, size_t index) {
  const c10::AliasInfo* info = schema.returns()[index].alias_info();
  if (!info || !info->isWrite()) return -1;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::AliasInfo* candidate = schema.arguments()[i].alias_info();
    if (candidate && *candidate == *info) return static_cast<int>(i);
  }
  return -1;
}

inline void call_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t count = schema.arguments().size();
  const size_t begin = stack->size() - count;
  const std::vector<c10::IValue> originals(stack->begin() + begin, stack->end());
  CpuCall call(op, *stack, begin);
  for (size_t i = 0; i < count; ++i)
    (*stack)[begin + i] = call.to_cpu(originals[i], schema.arguments()[i]);
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  if (schema.is_mutable()) call.write_back();
  const size_t first = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    const int argument = returned_argument(schema, i);
    (*stack)[first + i] = argument < 0 ? call.to_device((*stack)[first + i]) : originals[argument];
  }
}

}  // namespace simulated
