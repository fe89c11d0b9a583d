// x_t, t, the target and the kept labels of a batch on the CPU. See operators.h for the arithmetic.
#include "cpu.h"
#include "operators.h"

namespace sitfast {
namespace {

constexpr int64_t kGrain = 4096;  // values a thread takes at the least

template <class In, class Out>
void interpolate_rows(const Interpolate& a) {
  int64_t blocks = (a.size + 3) / 4, width = a.posterior ? 2 * a.size : a.size;
  std::vector<Sample> samples(a.batch);
  for (int64_t row = 0; row < a.batch; ++row) {
    samples[row] = draw_sample(a, row);
    a.t[row] = samples[row].t;
    if (a.labels) a.kept_labels[row] = draw_label(a, row);
  }
  torch::stable::parallel_for(0, a.batch * blocks, kGrain / 4, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      int64_t row = at / blocks, first = (at % blocks) * 4, count = std::min<int64_t>(4, a.size - first);
      const Sample& sample = samples[row];
      const In* in = static_cast<const In*>(sample.mirrored ? a.mirrored : a.data) + row * width + first;
      float values[4] = {}, logvar[4] = {}, target[4];
      for (int64_t i = 0; i < count; ++i) {
        values[i] = widen(in[i]);
        if (a.posterior) logvar[i] = widen(in[a.size + i]);
      }
      interpolate_four(a, sample, uint64_t(a.index[row]), uint32_t(first / 4), values, logvar, target);
      Out* xt = static_cast<Out*>(a.xt) + row * a.size + first;
      for (int64_t i = 0; i < count; ++i) {
        xt[i] = narrow<Out>(values[i]);
        a.target[row * a.size + first + i] = target[i];
      }
    }
  });
}

void run(const Interpolate& a, const Tensor&) {
  with_float_type("interpolate", "data", a.in, [&](auto in) {
    with_float_type("interpolate", "dtype", a.out, [&](auto out) { interpolate_rows<decltype(in), decltype(out)>(a); });
  });
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

STABLE_TORCH_LIBRARY_IMPL(sitfast, CPU, library) { library.impl("interpolate", TORCH_BOX(&sitfast::interpolate)); }
