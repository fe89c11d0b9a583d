// The loss of a sample and its gradient on the CPU: one sample a task, summed in fp64 in the order of its values.
#include "cpu.h"
#include "operators.h"

namespace sitfast {
namespace {

constexpr int kLanes = 8;  // of a sum: its order is fixed, and so is its result

/// Writes the errors and returns the sum of their squares; with `score` an error is out · sigma + target, else out − target.
template <bool score, class T>
double errors_of(const T* __restrict out, const float* __restrict target, float* __restrict error, float sigma,
                 int64_t count) {
  double lanes[kLanes] = {}, sum = 0;
  auto one = [&](int64_t i) {
    float value = widen(out[i]), difference = score ? value * sigma + target[i] : value - target[i];
    error[i] = score ? difference * sigma : difference;
    return double(difference * difference);
  };
  int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += one(i + lane);
  for (double lane : lanes) sum += lane;
  for (int64_t i = whole; i < count; ++i) sum += one(i);
  return sum;
}

template <class T>
void loss_rows(const Loss& a) {
  int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, a.size));
  torch::stable::parallel_for(0, a.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Coefficients c = coefficients(a.path, a.t[row]);
      const T* out = static_cast<const T*>(a.out) + row * a.out_stride;
      auto errors = a.prediction == kScore ? errors_of<true, T> : errors_of<false, T>;
      double sum = errors(out, a.target + row * a.size, a.error + row * a.size, c.sigma, a.size);
      float factor = a.prediction != kVelocity && a.weight != kNone ? loss_factor(a.weight, c) : 1.0f;
      a.loss[row] = float(sum / double(a.size)) * factor;
      a.factor[row] = 2.0f * factor / float(a.size);
    }
  });
}

template <class T>
void scale_rows(const LossBackward& a) {
  int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, a.out_size));
  torch::stable::parallel_for(0, a.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* error = a.error + row * a.size;
      T* dout = static_cast<T*>(a.dout) + row * a.out_size;
      float factor = a.factor[row] * a.dloss[row * a.dloss_stride];
      for (int64_t i = 0; i < a.size; ++i) dout[i] = narrow<T>(error[i] * factor);
      for (int64_t i = a.size; i < a.out_size; ++i) dout[i] = narrow<T>(0.0f);
    }
  });
}

void run(const Loss& a, const Tensor& out) {
  with_float_type("interpolant_loss", "out", out.scalar_type(), [&](auto type) { loss_rows<decltype(type)>(a); });
}

void run_backward(const LossBackward& a, const Tensor& dout) {
  with_float_type("interpolant_loss", "out", dout.scalar_type(), [&](auto type) { scale_rows<decltype(type)>(a); });
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

STABLE_TORCH_LIBRARY_IMPL(sitfast, CPU, library) {
  library.impl("interpolant_loss", TORCH_BOX(&sitfast::interpolant_loss));
  library.impl("interpolant_loss_backward", TORCH_BOX(&sitfast::interpolant_loss_backward));
}
