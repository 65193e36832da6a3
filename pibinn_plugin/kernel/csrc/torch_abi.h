// What the kernel calls of torch: C functions of its stable ABI, declared here. So the kernel is built without torch,
// and one shared object runs with every torch from 2.11 on. Their names and types are those of
// torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
struct TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct StableListOpaque;
using StableListHandle = StableListOpaque*;
using StableIValue = uint64_t;
using AOTITorchError = int32_t;

extern "C" {
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_memory_format_contiguous_format();

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* result);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** result);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* result);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* result);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** result);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** result);

AOTITorchError torch_list_size(StableListHandle list, size_t* size);
AOTITorchError torch_list_get_item(StableListHandle list, size_t index, StableIValue* element);
AOTITorchError torch_delete_list(StableListHandle list);

AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t version);
AOTITorchError torch_get_num_threads(uint32_t* result);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                                  void (*function)(int64_t begin, int64_t end, void* context), void* context);

AOTITorchError aoti_torch_library_init_impl(const char* name_space, const char* dispatch_key, const char* file,
                                            uint32_t line, TorchLibraryHandle* result);
AOTITorchError torch_library_impl(TorchLibraryHandle library, const char* name,
                                  void (*function)(StableIValue*, uint64_t, uint64_t), uint64_t version);
}

namespace pibinn {

constexpr uint64_t TORCH_VERSION = 0x020b000000000000;  // 2.11, the oldest whose rules the calls follow

inline void check(AOTITorchError error) {
  if (error) throw std::runtime_error("pibinn: torch refused a call");
}

// A value as torch passes it: in the first bytes of 64 bits.
template <typename T>
StableIValue from(T value) {
  static_assert(sizeof(T) <= sizeof(StableIValue));
  StableIValue result = 0;
  std::memcpy(&result, &value, sizeof(T));
  return result;
}

template <typename T>
T to(StableIValue value) {
  T result;
  std::memcpy(&result, &value, sizeof(T));
  return result;
}

template <typename Function>
void parallel_for(int64_t count, int64_t grain_size, const Function& function) {
  check(torch_parallel_for(
      0, count, grain_size, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Function*>(context))(begin, end); },
      const_cast<Function*>(&function)));
}

inline int64_t get_num_threads() {
  uint32_t result;
  check(torch_get_num_threads(&result));
  return result;
}

}  // namespace pibinn
