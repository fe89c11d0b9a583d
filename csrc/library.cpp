// The schemas of the operators, for PyTorch's stable ABI. Fake and autograd registrations stand in sitfast/kernels.
#include "operators.h"

STABLE_TORCH_LIBRARY(sitfast, library) {
  library.def(
      "interpolate(Tensor data, Tensor index, Tensor? t, Tensor? mirrored, Tensor? labels, int seed, int path, "
      "bool velocity, int sampling, float start, float span, float logit_mean, float logit_std, float time_shift, "
      "bool posterior, float scale, float shift, float drop, int null, ScalarType dtype) "
      "-> (Tensor xt, Tensor t, Tensor target, Tensor labels)");
  library.def(
      "interpolant_loss(Tensor out, Tensor target, Tensor t, int path, int prediction, int weight) "
      "-> (Tensor loss, Tensor error, Tensor factor)");
  library.def(
      "interpolant_loss_backward(Tensor dloss, Tensor error, Tensor factor, int channels, ScalarType dtype) -> Tensor");
  library.def("gradient_norm(Tensor[] grads) -> Tensor");
  library.def(
      "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!) steps, Tensor(e!)[] emas, Tensor(f!)[] copies, Tensor? divisor, Tensor? skip, float[] decays, "
      "int[] offsets, float lr, float beta1, float beta2, float eps, float weight_decay, int seed, int step) -> ()");
}
