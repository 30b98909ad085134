// A simulated CUDA device for a CPU build of torch: its tensors say `cuda:N`, their memory is main memory and their
// kernels are the CPU's. README.md says what is modelled; fakecuda.py loads this and completes torch.cuda.
//
// torch looks for a device in three places, all filled here: a device guard, CUDA's hooks and its kernels.
#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>

namespace {
using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::IValue, c10::Storage;
constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr DeviceIndex GPU_COUNT = 2;
thread_local DeviceIndex current_gpu = 0;

// --- counters and faults ---------------------------------------------------------------------------------------------
using Number = std::atomic<int64_t>;
std::map<std::string, Number> numbers;  // fakecuda.py reads and sets them by name.
Number &allocated = numbers["allocated"], &peak = numbers["peak"], &allocations = numbers["allocations"];
Number &kernels = numbers["kernels"], &waits = numbers["waits"], &memory = numbers["memory"];
Number &pinned_copies = numbers["pinned_copies"], &unpinned_copies = numbers["unpinned_copies"];
Number &kernels_missing = numbers["kernels_missing"], &broken = numbers["broken"];
// Each counts down from n to 0, where the n-th allocation or kernel fails.
Number &allocation_fails = numbers["allocation_fails"], &kernel_breaks = numbers["kernel_breaks"];

bool runs_out(Number& countdown) { return countdown > 0 && --countdown == 0; }

void raise_if(bool fails, int code, const char* text) {
  if (fails) throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, code, std::string("CUDA error: ") + text);
}
// A broken context answers every call with the same error, until the process ends.
void check_context() { raise_if(broken, 700, "an illegal memory access was encountered"); }
void synchronize() { check_context(), ++waits; }
// CUDA learns of a kernel's fault only after it has started: this call succeeds, and all later ones fail.
void start_kernel() {
  check_context();
  raise_if(kernels_missing, 209, "no kernel image is available for execution on the device");
  ++kernels;
  if (runs_out(kernel_breaks)) broken = 1;
}
void count_allocation(int64_t bytes) {
  check_context();
  ++allocations;
  bool fails = runs_out(allocation_fails) || allocated + bytes > memory;
  TORCH_CHECK_WITH(OutOfMemoryError, !fails, "CUDA out of memory. Tried to allocate ", bytes, " bytes; the card has ",
                   memory, ", of which ", allocated, " are in use.");
  int64_t now = allocated += bytes, highest = peak;
  while (now > highest && !peak.compare_exchange_weak(highest, now)) {}
}

// --- devices and pinned memory ---------------------------------------------------------------------------------------
// There is one stream, and whatever is put into it is done at once.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  Device getDevice() const override { return {CUDA, current_gpu}; }
  Device exchangeDevice(Device device) const override { return {CUDA, std::exchange(current_gpu, device.index())}; }
  void setDevice(Device device) const override { current_gpu = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current_gpu = device.index(); }
  DeviceIndex deviceCount() const noexcept override { return GPU_COUNT; }
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

std::mutex pinned_mutex;
std::set<const void*> pinned_blocks;

bool is_pinned(const void* block) {
  std::lock_guard lock(pinned_mutex);
  return pinned_blocks.count(block) > 0;
}
void free_pinned(void* block) {
  std::lock_guard lock(pinned_mutex);
  pinned_blocks.erase(block);
  std::free(block);
}
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    check_context();
    void* block = std::malloc(bytes + 1);  // Blocks are told apart by their address, so none may be empty.
    std::lock_guard lock(pinned_mutex);
    pinned_blocks.insert(block);
    return {block, block, &free_pinned, c10::DeviceType::CPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} pinned_allocator;

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return GPU_COUNT; }
  bool isPinnedPtr(const void* block) const override { return is_pinned(block); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
};
std::unique_ptr<at::CUDAHooksInterface> make_hooks(at::CUDAHooksArgs) { return std::make_unique<Hooks>(); }
const bool hooks_registered = (at::CUDAHooksRegistry()->Register("CUDAHooks", &make_hooks), true);

// --- memory ----------------------------------------------------------------------------------------------------------
// What a storage on one device keeps alive of the other's. Only memory that a kernel asked for is counted.
struct Owner {
  Storage storage;
  int64_t counted_bytes;
};
void release(void* owner) {
  allocated -= static_cast<Owner*>(owner)->counted_bytes;
  delete static_cast<Owner*>(owner);
}
Storage shared(const Storage& storage, Device device, int64_t counted_bytes) {
  c10::DataPtr data(const_cast<void*>(storage.data()), new Owner{storage, counted_bytes}, &release, device);
  return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(data),
                                               c10::GetAllocator(c10::DeviceType::CPU), /*resizable=*/true);
}
Tensor with_storage(const Tensor& tensor, Storage storage) {
  c10::DispatchKeySet key(storage.device_type() == CUDA ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
  Tensor result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), key, tensor.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return result;
}
// Return a twin of the CPU that shares a simulated tensor's memory.
Tensor as_cpu(const Tensor& tensor) { return with_storage(tensor, shared(tensor.storage(), c10::DeviceType::CPU, 0)); }
// Take a result of the CPU over to the device. One that shares an argument's memory is a view, and takes no more.
Storage storage_on_gpu(const Storage& storage, DeviceIndex gpu) {
  bool is_view = storage.data_ptr().get_deleter() == &release;
  if (!is_view) count_allocation(storage.nbytes());
  return shared(storage, {CUDA, gpu}, is_view ? 0 : storage.nbytes());
}
// Give a tensor its twin's shape and memory: a kernel may have resized what it wrote to.
void follow_resize(const Tensor& tensor, const Tensor& twin) {
  auto* impl = tensor.unsafeGetTensorImpl();
  if (twin.storage().data() != tensor.storage().data())
    impl->set_storage_keep_dtype(storage_on_gpu(twin.storage(), tensor.get_device()));
  if (twin.sizes() != tensor.sizes() || twin.strides() != tensor.strides())
    impl->set_sizes_and_strides(twin.sizes(), twin.strides(), twin.storage_offset());
}

// --- copies and kernels ----------------------------------------------------------------------------------------------
using Names = std::set<std::string>;
// The host waits for what these say: a number, or a result whose size depends on values.
const Names WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
                       "aten::bincount", "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave.Tensor"};
const Names WITHOUT_KERNEL = {"aten::empty.memory_format", "aten::empty_strided", "aten::resize_", "aten::view",
                              "aten::as_strided", "aten::_reshape_alias", "aten::unfold", "aten::_local_scalar_dense"};
// Its indices may lie in main memory, and are copied then; a mask is turned into indices first. Both wait.
const std::string INDEXING = "aten::_index_put_impl_";

Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  check_context();
  bool crosses = self.is_cuda() != source.is_cuda();
  if (!crosses || self.scalar_type() != source.scalar_type()) start_kernel();  // Otherwise bytes are only moved.
  if (crosses) {
    bool pinned = is_pinned((self.is_cuda() ? source : self).storage().data());
    ++(pinned ? pinned_copies : unpinned_copies);
    if (!non_blocking || (!pinned && source.is_cuda())) synchronize();
  }
  Tensor target = self.is_cuda() ? as_cpu(self) : self;
  target.copy_(source.is_cuda() ? as_cpu(source) : source);
  return self;
}

// Replace the tensors that a value holds.
template <typename Change> void change_tensors(IValue& value, const Change& change) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) value = change(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> list = value.toTensorList().copy();
    for (size_t i = 0; i < list.size(); ++i) list[i] = change(list.get(i));
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list = value.toOptionalTensorList().copy();
    for (size_t i = 0; i < list.size(); ++i)
      if (auto tensor = list.get(i)) list[i] = change(*tensor);
    value = list;
  }
}

// Run the CPU's kernel on twins of the arguments. Every operator that has no kernel of its own comes here.
void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  std::string name = c10::toString(schema.operator_name());
  check_context();
  if (!WITHOUT_KERNEL.count(name)) start_kernel();
  if (WAITING.count(name)) synchronize();

  std::vector<IValue> arguments(stack->end() - schema.arguments().size(), stack->end());
  std::vector<std::pair<Tensor, Tensor>> twins;
  std::optional<DeviceIndex> gpu;
  Names devices;
  auto borrow = [&](const Tensor& tensor) {
    if (tensor.is_cpu() && tensor.dim() == 0) return tensor;  // Kernels take such a tensor as a number.
    bool is_index = name == INDEXING && !twins.empty();
    if (is_index && (tensor.is_cpu() || tensor.scalar_type() == at::kBool)) synchronize();
    is_index ? void(unpinned_copies += tensor.is_cpu()) : void(devices.insert(tensor.device().str()));
    if (tensor.is_cpu()) return tensor;
    gpu = gpu.value_or(tensor.get_device());
    return twins.emplace_back(tensor, as_cpu(tensor)).second;
  };
  for (auto value = stack->end() - arguments.size(); value != stack->end(); ++value) {
    change_tensors(*value, borrow);
    if (value->isDevice() && value->toDevice().is_cuda()) {
      gpu = value->toDevice().has_index() ? value->toDevice().index() : current_gpu;
      *value = Device(c10::DeviceType::CPU);
    }
  }
  TORCH_CHECK(devices.size() < 2, "Expected all tensors to be on the same device, but found at least two devices, ",
              *devices.begin(), " and ", *devices.rbegin(), "! (when checking arguments of ", name, ")");
  op.callBoxed(*stack);
  for (const auto& [tensor, twin] : twins) follow_resize(tensor, twin);

  auto result = stack->end() - schema.returns().size();
  for (const auto& returned : schema.returns()) {
    std::optional<IValue> written;  // An argument that the operator writes to is what it returns.
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto *alias = returned.alias_info(), *other = schema.arguments()[i].alias_info();
      if (alias && other && alias->isWrite() && *alias == *other) written = arguments[i];
    }
    auto to_gpu = [&](const Tensor& tensor) {
      return with_storage(tensor, storage_on_gpu(tensor.storage(), gpu.value_or(current_gpu)));
    };
    written ? void(*result = *written) : change_tensors(*result, to_gpu);
    ++result;
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("copy_", &copy);
  // On CUDA one kernel serves a whole list; torch's default would start one for each of its tensors.
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames())
    if (op.name.starts_with("aten::_foreach_"))
      library.impl(c10::toString(op).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}
}  // namespace

extern "C" {  // This is what fakecuda.py calls.
int get_gpu() { return current_gpu; }
void set_gpu(int index) { current_gpu = static_cast<DeviceIndex>(index); }
int64_t get_number(const char* name) { return numbers.at(name); }
void set_number(const char* name, int64_t value) { numbers.at(name) = value; }
}
