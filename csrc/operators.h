// What the CPU and the CUDA side of an operator have in common: its arguments, their checks and its outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "mathematics.h"

namespace sitfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using half = torch::headeronly::Half;
using Tensors = std::vector<Tensor>;

SITFAST_SHARED float widen(float x) { return x; }
SITFAST_SHARED float widen(half x) { return float(x); }

template <class T>
SITFAST_SHARED T narrow(float x);
template <>
SITFAST_SHARED float narrow<float>(float x) { return x; }
template <>
SITFAST_SHARED bf16 narrow<bf16>(float x) { return nearest_bf16(x); }
template <>
SITFAST_SHARED half narrow<half>(float x) { return half(x); }

/// Calls `function` with a value of the C++ type of a floating dtype of at most 32 bits.
template <class Function>
void with_float_type(const char* op, const char* name, ScalarType dtype, Function&& function) {
  if (dtype == ScalarType::Float) return function(float());
  if (dtype == ScalarType::BFloat16) return function(bf16());
  STD_TORCH_CHECK(dtype == ScalarType::Half, op, ": ", name, " is ", torch::headeronly::toString(dtype),
                  ", expected fp32, bf16 or fp16; cast it first");
  function(half());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t size : tensor.sizes()) text += std::to_string(size) + ", ";
  return text + ")";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  auto left = a.sizes(), right = b.sizes();
  if (left.size() != right.size()) return false;
  for (size_t i = 0; i < left.size(); ++i)
    if (left[i] != right[i]) return false;
  return true;
}

inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(same_device(tensor, first), op, ": ", name, " is on another device than the first operand; move it");
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous; call .contiguous() on it");
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor empty_like(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// interpolate ---------------------------------------------------------------------------------------------------------

struct Interpolate {
  const void *data, *mirrored;  // [B, S], or moments [B, 2 S] with `posterior`; `mirrored` and what follows may be null
  const int64_t *index, *labels;
  const float* given_t;
  void* xt;
  float *t, *target;
  int64_t* kept_labels;
  int64_t batch, size;  // samples, and values in each
  uint64_t seed;
  int64_t path;
  bool velocity, posterior;
  TimeLaw law;
  float scale, shift, drop;
  int64_t null;
  ScalarType in, out;
};

/// What a sample's values share.
struct Sample {
  Coefficients c;
  float t;
  bool mirrored;
};

SITFAST_SHARED Sample draw_sample(const Interpolate& a, int64_t row) {
  uint64_t index = uint64_t(a.index[row]);
  Sample sample;
  sample.t = a.given_t ? a.given_t[row] : draw_time(a.law, a.seed, index);
  sample.c = coefficients(a.path, sample.t);
  sample.mirrored = a.mirrored && uniform(philox(a.seed, index, kFlip, 0).word[0]) < 0.5f;
  return sample;
}

SITFAST_SHARED int64_t draw_label(const Interpolate& a, int64_t row) {
  bool drop = a.drop > 0 && uniform(philox(a.seed, uint64_t(a.index[row]), kLabelDrop, 0).word[0]) < a.drop;
  return drop ? a.null : a.labels[row];
}

/// Values 4 block … of a sample, of which `data` holds four: x_t over them, and the target.
SITFAST_SHARED void interpolate_four(const Interpolate& a, const Sample& sample, uint64_t index, uint32_t block,
                                     float (&data)[4], const float (&logvar)[4], float (&target)[4]) {
  float noise[4], posterior[4];
  four_normals(a.seed, index, kNoise, block, noise);
  if (a.posterior) four_normals(a.seed, index, kVae, block, posterior);
  const Coefficients& c = sample.c;
  for (int i = 0; i < 4; ++i) {
    if (a.posterior) data[i] = (data[i] + exp32(0.5f * logvar[i]) * posterior[i] - a.shift) * a.scale;
    target[i] = a.velocity ? c.d_alpha * data[i] + c.d_sigma * noise[i] : noise[i];
    data[i] = c.alpha * data[i] + c.sigma * noise[i];
  }
}

/// Checks the operands and makes the outputs; `run` does the work.
template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> interpolate_with(
    Run run, const Tensor& values, const Tensor& index, const std::optional<Tensor>& t,
    const std::optional<Tensor>& mirrored, const std::optional<Tensor>& labels, int64_t seed, int64_t path,
    bool velocity, int64_t sampling, double start, double span, double logit_mean, double logit_std, double time_shift,
    bool posterior, double scale, double shift, double drop, int64_t null, ScalarType dtype) {
  const char* op = "interpolate";
  STD_TORCH_CHECK(values.dim() >= 1, op, ": data has no batch dimension");
  int64_t batch = values.size(0);
  auto check_row = [&](const char* name, const Tensor& tensor, ScalarType type) {
    check_like(op, name, tensor, values);
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == batch && tensor.scalar_type() == type, op, ": ", name,
                    " has shape ", shape_of(tensor), " of ", torch::headeronly::toString(tensor.scalar_type()),
                    ", expected (", batch, ",) of ", torch::headeronly::toString(type));
  };
  check_like(op, "data", values, values);
  check_row("index", index, ScalarType::Long);
  if (t) check_row("t", *t, ScalarType::Float);
  if (labels) check_row("labels", *labels, ScalarType::Long);
  if (mirrored) {
    check_like(op, "mirrored", *mirrored, values);
    STD_TORCH_CHECK(same_shape(*mirrored, values) && mirrored->scalar_type() == values.scalar_type(), op,
                    ": mirrored has shape ", shape_of(*mirrored), ", expected the shape and dtype of data, ",
                    shape_of(values));
  }
  std::vector<int64_t> sizes(values.sizes().begin(), values.sizes().end());
  if (posterior) {
    STD_TORCH_CHECK(values.dim() >= 2 && sizes[1] % 2 == 0, op, ": moments have shape ", shape_of(values),
                    ", expected [B, 2 C, ...]");
    sizes[1] /= 2;
  }
  int64_t size = 1;
  for (size_t i = 1; i < sizes.size(); ++i) size *= sizes[i];
  STD_TORCH_CHECK(size <= int64_t(1) << 34, op, ": a sample has ", size, " values, at most 2^34 can be drawn");
  Tensor xt = empty_like(values, sizes, dtype), target = empty_like(values, sizes, ScalarType::Float);
  Tensor time = empty_like(values, {batch}, ScalarType::Float);
  Tensor kept = empty_like(values, {labels ? batch : 0}, ScalarType::Long);
  Interpolate a{values.const_data_ptr(),
                mirrored ? mirrored->const_data_ptr() : nullptr,
                static_cast<const int64_t*>(index.const_data_ptr()),
                labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr,
                t ? static_cast<const float*>(t->const_data_ptr()) : nullptr,
                xt.mutable_data_ptr(),
                data<float>(time),
                data<float>(target),
                data<int64_t>(kept),
                batch,
                size,
                uint64_t(seed),
                path,
                velocity,
                posterior,
                {sampling, float(start), float(span), float(logit_mean), float(logit_std), float(time_shift)},
                float(scale),
                float(shift),
                float(drop),
                null,
                values.scalar_type(),
                dtype};
  if (batch > 0) run(a, values);
  return {xt, time, target, kept};
}

// interpolant_loss ----------------------------------------------------------------------------------------------------

/// The gradient is kept as `error` [B, S] in fp32 and a factor a sample; backward multiplies them, by what arrives too, and
/// rounds once.
struct Loss {
  const void* out;
  const float *target, *t;
  float *error, *loss, *factor;
  int64_t batch, size, out_stride;  // values used of a sample; distance of samples of `out`
  int64_t path, prediction, weight;
};

SITFAST_SHARED float loss_error(const Loss& a, float sigma, float out, float target) {
  return a.prediction == kScore ? out * sigma + target : out - target;
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor> interpolant_loss_with(Run run, const Tensor& out, const Tensor& target,
                                                         const Tensor& t, int64_t path, int64_t prediction,
                                                         int64_t weight) {
  const char* op = "interpolant_loss";
  auto check_shape = [&](bool agrees) {
    STD_TORCH_CHECK(agrees, op, ": out has shape ", shape_of(out), ", target ", shape_of(target),
                    ", expected [B, C or 2 C, ...] and [B, C, ...]");
  };
  check_shape(out.dim() >= 2 && target.dim() == out.dim() && out.size(0) == target.size(0));
  check_shape(out.size(1) == target.size(1) || out.size(1) == 2 * target.size(1));
  int64_t inner = 1, size = 1;
  for (int64_t i = out.dim() - 1; i >= 1; --i) {
    check_shape(i == 1 || out.size(i) == target.size(i));
    STD_TORCH_CHECK(out.size(i) == 1 || out.stride(i) == inner, op,
                    ": the samples of out are not dense; call .contiguous() on it");
    inner *= out.size(i), size *= target.size(i);
  }
  int64_t batch = out.size(0);
  check_like(op, "target", target, out);
  check_like(op, "t", t, out);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Float && t.scalar_type() == ScalarType::Float, op,
                  ": target and t must be fp32; cast them first");
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == batch, op, ": t has shape ", shape_of(t), ", expected (", batch, ",)");
  std::vector<int64_t> sizes(target.sizes().begin(), target.sizes().end());
  Tensor error = empty_like(target, sizes, ScalarType::Float);
  Tensor loss = empty_like(target, {batch}, ScalarType::Float), factor = empty_like(target, {batch}, ScalarType::Float);
  Loss a{out.const_data_ptr(), static_cast<const float*>(target.const_data_ptr()),
         static_cast<const float*>(t.const_data_ptr()), data<float>(error), data<float>(loss), data<float>(factor),
         batch, size, out.stride(0), path, prediction, weight};
  if (batch > 0) run(a, out);
  return {loss, error, factor};
}

struct LossBackward {
  const float *error, *factor, *dloss;
  void* dout;
  int64_t batch, size, out_size, dloss_stride;  // values of a sample: used, in `dout`
};

template <class Run>
Tensor interpolant_loss_backward_with(Run run, const Tensor& dloss, const Tensor& error, const Tensor& factor,
                                      int64_t channels, ScalarType dtype) {
  const char* op = "interpolant_loss_backward";
  check_like(op, "error", error, error);
  check_like(op, "factor", factor, error);
  STD_TORCH_CHECK(error.dim() >= 2 && channels >= error.size(1) && error.scalar_type() == ScalarType::Float, op,
                  ": error must be fp32 [B, C, ...] of at most ", channels, " channels, it has shape ", shape_of(error));
  int64_t batch = error.size(0);
  for (const Tensor* row : {&dloss, &factor})
    STD_TORCH_CHECK(same_device(*row, error) && row->dim() == 1 && row->size(0) == batch &&
                        row->scalar_type() == ScalarType::Float,
                    op, ": dloss and factor must be fp32 (", batch, ",) on the device of error");
  std::vector<int64_t> sizes(error.sizes().begin(), error.sizes().end());
  int64_t inner = 1;
  for (size_t i = 2; i < sizes.size(); ++i) inner *= sizes[i];
  LossBackward a{static_cast<const float*>(error.const_data_ptr()), static_cast<const float*>(factor.const_data_ptr()),
                 static_cast<const float*>(dloss.const_data_ptr()), nullptr, batch, inner * sizes[1], inner * channels,
                 dloss.stride(0)};
  sizes[1] = channels;
  Tensor dout = empty_like(error, sizes, dtype);
  a.dout = dout.mutable_data_ptr();
  if (batch > 0) run(a, dout);
  return dout;
}

// gradient_norm and adamw_ema -----------------------------------------------------------------------------------------

inline void check_list(const char* op, const char* name, const Tensors& list, const Tensors& params) {
  STD_TORCH_CHECK(list.size() == params.size(), op, ": ", name, " has ", list.size(), " tensors, params has ",
                  params.size());
  for (size_t i = 0; i < list.size(); ++i) {
    check_like(op, name, list[i], params[0]);
    STD_TORCH_CHECK(list[i].scalar_type() == list[0].scalar_type(), op, ": ", name, " mixes dtypes: number ", i, " is ",
                    torch::headeronly::toString(list[i].scalar_type()), ", the first ",
                    torch::headeronly::toString(list[0].scalar_type()));
    STD_TORCH_CHECK(same_shape(list[i], params[i]), op, ": ", name, " number ", i, " has shape ",
                    shape_of(list[i]), ", params has ", shape_of(params[i]));
  }
}

inline void check_dtype(const char* op, const char* name, const Tensors& list, bool fp32, bool bf16) {
  if (list.empty()) return;
  ScalarType dtype = list[0].scalar_type();
  STD_TORCH_CHECK((fp32 && dtype == ScalarType::Float) || (bf16 && dtype == ScalarType::BFloat16), op, ": ", name, " is ",
                  torch::headeronly::toString(dtype), ", expected ",
                  fp32 && bf16 ? "fp32 or bf16" : fp32 ? "fp32" : "bf16");
}

struct Hyper {
  double lr, beta1, beta2, eps, weight_decay;
  uint64_t seed;
  uint32_t step;
  bool stochastic;  // the moments are bf16
};

/// The lists of an update, checked before anything is written: no operand of a refused call changes.
struct Lists {
  Tensors params, grads, exp_avgs, exp_avg_sqs, copies;
  std::vector<Tensors> emas;
  std::vector<double> decays;
  Tensor steps;
  std::optional<Tensor> divisor, skip;
  std::vector<int64_t> offsets;

  int64_t offset(size_t i) const { return offsets.empty() ? 0 : offsets[i]; }
};

inline Lists check_lists(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                         const Tensors& exp_avg_sqs, const Tensor& steps, const Tensors& emas, const Tensors& copies,
                         const std::optional<Tensor>& divisor, const std::optional<Tensor>& skip,
                         const std::vector<double>& decays, const std::vector<int64_t>& offsets, double beta1,
                         double beta2, int64_t step) {
  const char* op = "adamw_ema";
  size_t count = params.size();
  Lists lists{params, grads, exp_avgs, exp_avg_sqs, copies, {}, decays, steps, divisor, skip, offsets};
  STD_TORCH_CHECK(emas.size() == count * decays.size(), op, ": ", emas.size(), " averages for ", decays.size(),
                  " decays and ", count, " params");
  for (size_t k = 0; k < decays.size(); ++k)
    lists.emas.emplace_back(emas.begin() + k * count, emas.begin() + (k + 1) * count);
  STD_TORCH_CHECK(steps.dim() == 1 && steps.size(0) == int64_t(count) && steps.scalar_type() == ScalarType::Float, op,
                  ": steps must be fp32 of shape (", count, ",)");
  STD_TORCH_CHECK(offsets.empty() || offsets.size() == count, op, ": ", offsets.size(), " offsets for ", count,
                  " params");
  STD_TORCH_CHECK(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, op, ": betas ", beta1, " and ", beta2,
                  " must be in [0, 1)");
  STD_TORCH_CHECK(step >= 0 && step < int64_t(1) << 24, op, ": step ", step, " must be in [0, 2^24)");
  if (count == 0) return lists;
  check_list(op, "params", params, params);
  check_list(op, "grads", grads, params);
  check_list(op, "exp_avgs", exp_avgs, params);
  check_list(op, "exp_avg_sqs", exp_avg_sqs, params);
  if (!copies.empty()) check_list(op, "copies", copies, params);
  for (const Tensors& average : lists.emas) {
    check_list(op, "emas", average, params);
    check_dtype(op, "emas", average, true, false);
  }
  check_dtype(op, "params", params, true, false);
  check_dtype(op, "grads", grads, true, true);
  check_dtype(op, "exp_avgs", exp_avgs, true, true);
  check_dtype(op, "copies", copies, false, true);
  STD_TORCH_CHECK(exp_avgs[0].scalar_type() == exp_avg_sqs[0].scalar_type(), op,
                  ": exp_avgs and exp_avg_sqs differ in dtype");
  check_like(op, "steps", steps, params[0]);
  for (const std::optional<Tensor>* scalar : {&divisor, &skip}) {
    if (!*scalar) continue;
    STD_TORCH_CHECK((*scalar)->numel() == 1 && (*scalar)->scalar_type() == ScalarType::Float, op,
                    ": divisor and skip must be single fp32 values");
    check_like(op, "divisor or skip", **scalar, params[0]);
  }
  return lists;
}

}  // namespace sitfast
