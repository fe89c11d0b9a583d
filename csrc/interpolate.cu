// x_t, t, the target and the kept labels of a batch on the GPU: one launch, no intermediate in memory.
//
// A block draws the time of its sample once and takes 4 · kThreads values; a thread takes four, one Philox block.
#include "cuda.h"

namespace sitfast {
namespace {

constexpr int kThreads = 256;

template <class In, class Out, bool aligned>
__global__ void __launch_bounds__(kThreads) interpolate_kernel(const __grid_constant__ Interpolate a, int64_t parts) {
  __shared__ Sample shared;
  int64_t row = blockIdx.x / parts, part = blockIdx.x % parts;
  if (threadIdx.x == 0) {
    shared = draw_sample(a, row);
    if (part == 0) {
      a.t[row] = shared.t;
      if (a.labels) a.kept_labels[row] = draw_label(a, row);
    }
  }
  __syncthreads();
  Sample sample = shared;
  int64_t block = part * kThreads + threadIdx.x, first = 4 * block;
  if (first >= a.size) return;
  int64_t at = row * a.size + first;
  const In* in = static_cast<const In*>(sample.mirrored ? a.mirrored : a.data) + (a.posterior ? at + row * a.size : at);
  Out* xt = static_cast<Out*>(a.xt) + at;
  float values[4] = {}, logvar[4] = {}, target[4];
  if constexpr (aligned) {
    load_four(in, values);
    if (a.posterior) load_four(in + a.size, logvar);
  } else {
    for (int i = 0; i < 4 && first + i < a.size; ++i) {
      values[i] = widen(in[i]);
      if (a.posterior) logvar[i] = widen(in[a.size + i]);
    }
  }
  interpolate_four(a, sample, uint64_t(a.index[row]), uint32_t(block), values, logvar, target);
  if constexpr (aligned) {
    store_four(xt, values);
    store_four(a.target + at, target);
  } else {
    for (int i = 0; i < 4 && first + i < a.size; ++i) xt[i] = narrow<Out>(values[i]), a.target[at + i] = target[i];
  }
}

void run(const Interpolate& a, const Tensor& values) {
  OnDevice on(values);
  int64_t parts = std::max<int64_t>(1, ceil_div(a.size, 4 * kThreads));
  STD_TORCH_CHECK(a.batch * parts < int64_t(1) << 31, "interpolate: the batch is too large for one launch; split it");
  uint64_t addresses = uint64_t(a.data) | uint64_t(a.mirrored) | uint64_t(a.xt) | uint64_t(a.target);
  bool aligned = a.size % 4 == 0 && addresses % 16 == 0;
  with_float_type("interpolate", "data", a.in, [&](auto in) {
    with_float_type("interpolate", "dtype", a.out, [&](auto out) {
      auto kernel = aligned ? interpolate_kernel<decltype(in), decltype(out), true>
                            : interpolate_kernel<decltype(in), decltype(out), false>;
      kernel<<<a.batch * parts, kThreads, 0, stream_of(values)>>>(a, parts);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> interpolate(
    const Tensor& values, const Tensor& index, std::optional<Tensor> t, std::optional<Tensor> mirrored,
    std::optional<Tensor> labels, int64_t seed, int64_t path, bool velocity, int64_t sampling, double start,
    double span, double logit_mean, double logit_std, double time_shift, bool posterior, double scale, double shift,
    double drop, int64_t null, ScalarType dtype) {
  return interpolate_with(run, values, index, t, mirrored, labels, seed, path, velocity, sampling, start, span,
                          logit_mean, logit_std, time_shift, posterior, scale, shift, drop, null, dtype);
}

}  // namespace
}  // namespace sitfast

STABLE_TORCH_LIBRARY_IMPL(sitfast, CUDA, library) { library.impl("interpolate", TORCH_BOX(&sitfast::interpolate)); }
