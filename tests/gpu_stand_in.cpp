// A device of type CUDA in the host's memory, for a torch that was built without CUDA.
//
// Its tensors are plain ones to torch and to Python: `is_cuda`, no `numpy()`, storages of their own
// device. What an operator does is done by the CPU's kernel on the same memory; here is only what
// differs: where memory comes from and how much there may be, and that tensors of the two devices
// are not mixed, but for what a GPU's kernels take from the host as well.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <unordered_map>

namespace {

using c10::Device;
using c10::DeviceType;

const Device kGpu(DeviceType::CUDA, 0);
std::atomic<int64_t> in_use{0}, most{0}, limit{0};

void take(int64_t bytes) {
  const int64_t now = in_use += bytes;
  if (limit && now > limit) {
    in_use -= bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory: ", bytes, " bytes, of a stand-in");
  }
  for (int64_t seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
  }
}

// Memory of the device is a host storage that something keeps.
struct Owned {
  c10::Storage host;
  int64_t bytes;
};

c10::DataPtr adopt(const c10::Storage& host) {
  auto* owned = new Owned{host, static_cast<int64_t>(host.nbytes())};
  try {
    take(owned->bytes);
  } catch (...) {
    delete owned;
    throw;
  }
  return {const_cast<void*>(host.data()), owned,
          [](void* kept) {
            auto* had = static_cast<Owned*>(kept);
            in_use -= had->bytes;
            delete had;
          },
          kGpu};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* host = c10::GetAllocator(DeviceType::CPU);
    return adopt(c10::Storage(c10::Storage::use_byte_size_t(), bytes, host->allocate(bytes), host, false));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};
Memory memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kGpu; }
  Device getDevice() const override { return kGpu; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// What torch asks of CUDA itself: that it is there, and for generators, which are the host's.
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  void deviceSynchronize(c10::DeviceIndex) const override {}
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  Device getDeviceFromPtr(void*) const override { return kGpu; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

at::Tensor like(const at::Tensor& t, const c10::Storage& storage, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return made;
}

// One call's tensors, as the CPU's kernels see them.
class Call {
 public:
  explicit Call(std::string name) : name_(std::move(name)) {}

  c10::IValue on_host(const c10::IValue& value) {
    if (value.isTensor()) return tensor(value.toTensor());
    if (value.isDevice()) return value.toDevice().is_cuda() ? c10::IValue(Device(DeviceType::CPU)) : value;
    if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& t : value.toTensorVector()) made.push_back(tensor(t));
      return made;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> made;
      for (const auto& given : value.toOptionalTensorList().vec())
        made.push_back(given ? std::optional(tensor(*given)) : std::nullopt);
      return made;
    }
    return value;
  }

  void check() const {
    TORCH_CHECK(!foreign_ || !ours_ || (first_ours_ && takes_both()), "Expected all tensors to be on the same device, but ",
                name_, " was given one on cuda:0 and one on cpu");
  }

  c10::IValue on_device(const c10::IValue& value) const {
    if (value.isTensor()) return back(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& t : value.toTensorVector()) made.push_back(back(t));
      return made;
    }
    return value;
  }

 private:
  bool takes_both() const {  // indices of what is on the device may be on the host
    return name_ == "aten::index" || name_ == "aten::index_put_" || name_ == "aten::_index_put_impl_";
  }

  at::Tensor tensor(const at::Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      foreign_ |= t.dim() > 0;
      return t;
    }
    first_ours_ |= !foreign_;
    ours_ = true;
    auto* own = t.storage().unsafeGetStorageImpl();
    auto found = storages_.find(own);
    if (found == storages_.end()) {
      auto* kept = new c10::Storage(t.storage());
      c10::DataPtr data{const_cast<void*>(kept->data()), kept,
                        [](void* had) { delete static_cast<c10::Storage*>(had); }, Device(DeviceType::CPU)};
      c10::Storage host(c10::Storage::use_byte_size_t(), kept->nbytes(), std::move(data),
                        c10::GetAllocator(DeviceType::CPU), true);
      found = storages_.emplace(own, host).first;
      owners_.emplace(host.unsafeGetStorageImpl(), t.storage());
    }
    auto made = like(t, found->second, c10::DispatchKey::CPU);
    tensors_.emplace(made.unsafeGetTensorImpl(), Pair{made, t});
    return made;
  }

  at::Tensor back(const at::Tensor& t) const {
    if (!t.defined() || t.is_cuda()) return t;
    if (auto same = tensors_.find(t.unsafeGetTensorImpl()); same != tensors_.end()) {
      resized(same->second.own, t);
      return same->second.own;
    }
    if (auto owner = owners_.find(t.storage().unsafeGetStorageImpl()); owner != owners_.end())
      return like(t, owner->second, c10::DispatchKey::CUDA);
    c10::Storage own(c10::Storage::use_byte_size_t(), t.storage().nbytes(), adopt(t.storage()), &memory, true);
    return like(t, own, c10::DispatchKey::CUDA);
  }

  // What an operator has made larger has other memory now.
  static void resized(const at::Tensor& own, const at::Tensor& host) {
    if (own.sizes() == host.sizes() && own.strides() == host.strides()) return;
    auto* storage = own.storage().unsafeGetStorageImpl();
    if (storage->nbytes() != host.storage().nbytes()) {
      storage->set_data_ptr_noswap(adopt(host.storage()));
      storage->set_nbytes(host.storage().nbytes());
    }
    own.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }

  std::string name_;
  bool ours_ = false, foreign_ = false, first_ours_ = false;
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages_, owners_;
  struct Pair {
    at::Tensor host, own;  // the first is kept, so that no other tensor gets its address
  };
  std::unordered_map<c10::TensorImpl*, Pair> tensors_;
};

void any(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call(op.schema().name());
  const size_t count = op.schema().arguments().size(), start = stack->size() - count;
  std::vector<c10::IValue> given;
  for (size_t i = start; i < stack->size(); ++i) given.push_back(call.on_host((*stack)[i]));
  call.check();
  if (op.schema().name().find("index_put_") != std::string::npos) {
    const auto values = (*stack)[start + 2].toTensor();
    TORCH_CHECK(values.is_cuda() || values.dim() == 0, "Expected values on cuda:0, got some on cpu");
  }
  torch::jit::Stack inner(given);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &inner);
  }
  stack->resize(start);
  for (const auto& value : inner) stack->push_back(call.on_device(value));
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& src, bool) {
  Call call("aten::copy_");
  auto to = call.on_host(self).toTensor(), from = call.on_host(src).toTensor();
  at::AutoDispatchBelowADInplaceOrView below;
  to.copy_(from);
  return self;
}

// Attention that is asked for nothing special is fused, as on a GPU: its scores are never all there.
int64_t choose_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const std::optional<at::Tensor>& mask, double dropout, bool, std::optional<double>, bool) {
  const bool masked = mask && mask->defined(), grad = q.requires_grad() || k.requires_grad() || v.requires_grad();
  const bool plain = !masked && !grad && dropout == 0 && q.dim() == 4;
  return static_cast<int64_t>(plain ? at::SDPBackend::flash_attention : at::SDPBackend::math);
}

using Fused = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor,
                         at::Tensor, at::Tensor>;

Fused fused_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double, bool causal, bool,
                      std::optional<double> scale) {
  Call call("aten::_scaled_dot_product_flash_attention");
  auto on_host = [&call](const at::Tensor& t) { return call.on_host(t).toTensor(); };
  const auto queries = on_host(q), keys = on_host(k), values = on_host(v);
  call.check();
  at::AutoDispatchBelowADInplaceOrView below;
  const int64_t each = q.size(1) / k.size(1);
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      queries, keys.repeat_interleave(each, 1), values.repeat_interleave(each, 1), 0.0, causal, std::nullopt, scale);
  auto on_device = [&call](const at::Tensor& t) { return call.on_device(t).toTensor(); };
  return {on_device(out), on_device(sums), {}, {}, q.size(2), k.size(2), {}, {}, {}};
}

}  // namespace

namespace at {
using CUDAHooks = Hooks;  // torch looks for this name
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&any>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("copy_", copy_);
  m.impl("_scaled_dot_product_flash_attention", fused_attention);
}

extern "C" {
void stand_in_begin() {
  c10::SetAllocator(DeviceType::CUDA, &memory);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
}
int64_t stand_in_in_use() { return in_use; }
int64_t stand_in_most() { return most; }
void stand_in_reset() { most = in_use.load(); }
void stand_in_limit(int64_t bytes) { limit = bytes; }
}
