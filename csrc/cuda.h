// What the CUDA operators share: streams, launches, vector accesses, block sums.
#pragma once

#include <cuda_runtime.h>

#include "operators.h"

namespace sitfast {

/// The device of a tensor is the current one as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(tensor.get_device_index(), &guard_));
  }
  ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  CUDAGuardHandle guard_;
};

inline cudaStream_t stream_of(const Tensor& tensor) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Four values in one access; `T* ` must be aligned to four of them.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

template <class T>
__device__ __forceinline__ void load_four(const T* from, float (&to)[4]) {
  Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = widen(four.value[i]);
}

template <class T>
__device__ __forceinline__ void store_four(T* to, const float (&from)[4]) {
  Four<T> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.value[i] = narrow<T>(from[i]);
  *reinterpret_cast<Four<T>*>(to) = four;
}

/// The sum over a block of `threads`, in a fixed order; thread 0 has it.
template <int threads, class T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T sums[threads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < threads / 32 ? sums[threadIdx.x] : T(0);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  }
  return value;
}

}  // namespace sitfast
