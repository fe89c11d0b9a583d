// The loss of a sample and its gradient on the GPU.
//
// A block takes up to kPart values of one sample: it reads the prediction and the target once, writes the error and sums.
// Samples of more than one part are added up by a second launch, in the order of their parts. Backward makes the
// gradient of the error, with zeros for an unused half of the channels, which is never read.
#include "cuda.h"

namespace sitfast {
namespace {

constexpr int kThreads = 1024;  // a thread takes one access of four values: all loads of a sample are in flight at once
constexpr int64_t kPart = 4 * kThreads;

struct Range {
  int64_t row, begin, end;
};

__device__ __forceinline__ Range range_of(int64_t parts, int64_t size) {
  int64_t row = blockIdx.x / parts, begin = blockIdx.x % parts * kPart;
  return {row, begin, begin + kPart < size ? begin + kPart : size};
}

/// What is left of `out` beyond the `size` used values of a sample becomes zero; a part clears as much as its share.
template <class T, bool aligned>
__device__ __forceinline__ void clear_unused(T* row, int64_t size, int64_t out_size, int64_t parts) {
  int64_t share = ((out_size - size + parts - 1) / parts + 3) / 4 * 4;
  int64_t begin = size + blockIdx.x % parts * share, end = begin + share < out_size ? begin + share : out_size;
  if constexpr (aligned) {
    const float zeros[4] = {};
    for (int64_t i = begin + 4 * threadIdx.x; i < end; i += 4 * kThreads) store_four(row + i, zeros);
  } else {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) row[i] = narrow<T>(0.0f);
  }
}

__device__ __forceinline__ void finish(const Loss& a, int64_t row, float sum) {
  bool weighted = a.prediction != kVelocity && a.weight != kNone;
  float factor = weighted ? loss_factor(a.weight, coefficients(a.path, a.t[row])) : 1.0f;
  a.loss[row] = sum / float(a.size) * factor;
  a.factor[row] = 2.0f * factor / float(a.size);
}

template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 2) loss_kernel(const __grid_constant__ Loss a, float* partial, int64_t parts) {
  __shared__ float shared_sigma;
  Range range = range_of(parts, a.size);
  if (threadIdx.x == 0) shared_sigma = a.prediction == kScore ? coefficients(a.path, a.t[range.row]).sigma : 1.0f;
  __syncthreads();
  float sigma = shared_sigma, sum = 0;
  const T* out = static_cast<const T*>(a.out) + range.row * a.out_stride;
  const float* target = a.target + range.row * a.size;
  float* error = a.error + range.row * a.size;
  if constexpr (aligned) {
    for (int64_t i = range.begin + 4 * threadIdx.x; i < range.end; i += 4 * kThreads) {
      float prediction[4], goal[4];
      load_four(out + i, prediction), load_four(target + i, goal);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float difference = loss_error(a, sigma, prediction[k], goal[k]);
        sum += difference * difference;
        prediction[k] = difference * sigma;
      }
      store_four(error + i, prediction);
    }
  } else {
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kThreads) {
      float difference = loss_error(a, sigma, widen(out[i]), target[i]);
      sum += difference * difference;
      error[i] = difference * sigma;
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    if (parts == 1)
      finish(a, range.row, sum);
    else
      partial[blockIdx.x] = sum;
  }
}

/// One warp a sample.
__global__ void finish_kernel(const __grid_constant__ Loss a, const float* partial, int64_t parts) {
  int64_t row = blockIdx.x;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < parts; i += 32) sum += partial[row * parts + i];
  sum = block_sum<32>(sum);
  if (threadIdx.x == 0) finish(a, row, sum);
}

template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ LossBackward a, int64_t parts) {
  Range range = range_of(parts, a.size);
  float factor = a.factor[range.row] * a.dloss[range.row * a.dloss_stride];
  const float* error = a.error + range.row * a.size;
  T* dout = static_cast<T*>(a.dout) + range.row * a.out_size;
  if constexpr (aligned) {
    for (int64_t i = range.begin + 4 * threadIdx.x; i < range.end; i += 4 * kThreads) {
      float value[4];
      load_four(error + i, value);
#pragma unroll
      for (int k = 0; k < 4; ++k) value[k] *= factor;
      store_four(dout + i, value);
    }
  } else {
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kThreads)
      dout[i] = narrow<T>(error[i] * factor);
  }
  if (a.out_size > a.size) clear_unused<T, aligned>(dout, a.size, a.out_size, parts);
}

int64_t parts_of(int64_t batch, int64_t size) {
  int64_t parts = std::max<int64_t>(1, ceil_div(size, kPart));
  STD_TORCH_CHECK(batch * parts < int64_t(1) << 31, "interpolant_loss: the batch is too large for one launch; split it");
  return parts;
}

void run(const Loss& a, const Tensor& out) {
  OnDevice on(out);
  cudaStream_t stream = stream_of(out);
  int64_t parts = parts_of(a.batch, a.size);
  Tensor partial = empty_like(out, {parts > 1 ? a.batch * parts : 0}, ScalarType::Float);
  with_float_type("interpolant_loss", "out", out.scalar_type(), [&](auto type) {
    using T = decltype(type);
    uint64_t addresses = uint64_t(a.out) | uint64_t(a.target) | uint64_t(a.error);
    bool aligned = a.size % 4 == 0 && a.out_stride % 4 == 0 && addresses % 16 == 0;
    auto kernel = aligned ? loss_kernel<T, true> : loss_kernel<T, false>;
    kernel<<<a.batch * parts, kThreads, 0, stream>>>(a, data<float>(partial), parts);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (parts > 1) {
    finish_kernel<<<a.batch, 32, 0, stream>>>(a, data<float>(partial), parts);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void run_backward(const LossBackward& a, const Tensor& dout) {
  OnDevice on(dout);
  int64_t parts = parts_of(a.batch, a.size);
  with_float_type("interpolant_loss", "out", dout.scalar_type(), [&](auto type) {
    using T = decltype(type);
    uint64_t addresses = uint64_t(a.error) | uint64_t(a.dout);
    bool aligned = a.size % 4 == 0 && a.out_size % 4 == 0 && addresses % 16 == 0;
    auto kernel = aligned ? scale_kernel<T, true> : scale_kernel<T, false>;
    kernel<<<a.batch * parts, kThreads, 0, stream_of(dout)>>>(a, parts);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> interpolant_loss(const Tensor& out, const Tensor& target, const Tensor& t,
                                                    int64_t path, int64_t prediction, int64_t weight) {
  return interpolant_loss_with(run, out, target, t, path, prediction, weight);
}

Tensor interpolant_loss_backward(const Tensor& dloss, const Tensor& error, const Tensor& factor,
                                 int64_t channels, ScalarType dtype) {
  return interpolant_loss_backward_with(run_backward, dloss, error, factor, channels, dtype);
}

}  // namespace
}  // namespace sitfast

STABLE_TORCH_LIBRARY_IMPL(sitfast, CUDA, library) {
  library.impl("interpolant_loss", TORCH_BOX(&sitfast::interpolant_loss));
  library.impl("interpolant_loss_backward", TORCH_BOX(&sitfast::interpolant_loss_backward));
}
