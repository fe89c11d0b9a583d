// The gradient norm, and AdamW with averages and bf16 copies, on the CPU: one pass over memory each.
//
// Tensors are cut into chunks that do not depend on the number of threads. One loop over p, g, m, v and the first average
// does the usual case, since memory is read ahead best along few long streams; what is not fp32 goes through buffers in
// pieces that stay in the first-level cache. Each loop is simple enough to vectorise.
#include "cpu.h"
#include "operators.h"

namespace sitfast {
namespace {

constexpr int64_t kChunk = 1 << 16, kLongPiece = 1 << 14, kPiece = 1 << 10;
constexpr int kLanes = 16;  // of a sum: its order is fixed, and so is its result

struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

std::vector<Chunk> chunks_of(const Tensors& tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t begin = 0, count = tensors[i].numel(); begin < count; begin += kChunk)
      chunks.push_back({i, begin, std::min(begin + kChunk, count)});
  return chunks;
}

template <class Function>
void for_each_chunk(const std::vector<Chunk>& chunks, Function&& function) {
  torch::stable::parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i, chunks[i]);
  });
}

// The loops -----------------------------------------------------------------------------------------------------------

SITFAST_CLONES void widen_all(const bf16* __restrict in, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen(in[i]);
}

SITFAST_CLONES void round_all(const float* __restrict in, bf16* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = nearest_bf16(in[i]);
}

SITFAST_CLONES void adamw_all(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
                              float divisor, AdamW a, int64_t count) {
  for (int64_t i = 0; i < count; ++i) adamw(p[i], g[i] / divisor, m[i], v[i], a);
}

SITFAST_CLONES void adamw_average_all(float* __restrict p, const float* __restrict g, float* __restrict m,
                                      float* __restrict v, float* __restrict average, float rate, float divisor,
                                      AdamW a, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    adamw(p[i], g[i] / divisor, m[i], v[i], a);
    average[i] = average[i] + rate * (p[i] - average[i]);
  }
}

SITFAST_CLONES void average_all(float* __restrict average, const float* __restrict p, float rate, int64_t count) {
  for (int64_t i = 0; i < count; ++i) average[i] = average[i] + rate * (p[i] - average[i]);
}

SITFAST_CLONES double square_sum(const float* __restrict x, int64_t count) {
  float lanes[kLanes] = {};
  int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += double(lanes[lane]);
  for (int64_t i = whole; i < count; ++i) sum += double(x[i] * x[i]);
  return sum;
}

/// Moments back to bf16: 16 random bits each, of the word of their element.
void round_moments(const float* m, const float* v, bf16* m_out, bf16* v_out, const Hyper& h, size_t tensor,
                   int64_t first, int64_t count) {
  int64_t block = -1;
  Words words;
  for (int64_t i = 0; i < count; ++i) {
    int64_t element = first + i;
    if (element / 4 != block) {
      block = element / 4;
      words = philox(h.seed, tensor, kRounding | h.step << 8, uint32_t(block));
    }
    uint32_t random = words.at(element);
    m_out[i] = stochastic_bf16(m[i], random), v_out[i] = stochastic_bf16(v[i], random >> 16);
  }
}

// The operators -------------------------------------------------------------------------------------------------------

Tensor gradient_norm(const Tensors& grads) {
  STD_TORCH_CHECK(!grads.empty(), "gradient_norm: no gradients");
  check_list("gradient_norm", "grads", grads, grads);
  check_dtype("gradient_norm", "grads", grads, true, true);
  bool wide = grads[0].scalar_type() == ScalarType::Float;
  std::vector<Chunk> chunks = chunks_of(grads);
  std::vector<double> sums(chunks.size());
  for_each_chunk(chunks, [&](int64_t at, const Chunk& chunk) {
    float buffer[kPiece];
    double sum = 0;
    for (int64_t i = chunk.begin; i < chunk.end; i += kPiece) {
      int64_t count = std::min(kPiece, chunk.end - i);
      const float* g = buffer;
      if (wide)
        g = data<float>(grads[chunk.tensor]) + i;
      else
        widen_all(data<bf16>(grads[chunk.tensor]) + i, buffer, count);
      sum += square_sum(g, count);
    }
    sums[at] = sum;
  });
  double total = 0;
  for (double sum : sums) total += sum;
  Tensor norm = empty_like(grads[0], {}, ScalarType::Float);
  *data<float>(norm) = float(std::sqrt(total));
  return norm;
}

void update_chunk(const Lists& lists, const Hyper& h, const AdamW& scalars, float divisor, const Chunk& chunk) {
  size_t tensor = chunk.tensor, averages = lists.emas.size();
  float g_buffer[kPiece], m_buffer[kPiece], v_buffer[kPiece];
  bool wide = lists.grads[tensor].scalar_type() == ScalarType::Float;
  int64_t step = wide && !h.stochastic ? kLongPiece : kPiece;
  for (int64_t i = chunk.begin; i < chunk.end; i += step) {
    int64_t count = std::min(step, chunk.end - i);
    float* p = data<float>(lists.params[tensor]) + i;
    const float* g = wide ? data<float>(lists.grads[tensor]) + i : g_buffer;
    if (!wide) widen_all(data<bf16>(lists.grads[tensor]) + i, g_buffer, count);
    bf16 *narrow_m = nullptr, *narrow_v = nullptr;
    float *m = m_buffer, *v = v_buffer;
    if (h.stochastic) {
      narrow_m = data<bf16>(lists.exp_avgs[tensor]) + i, narrow_v = data<bf16>(lists.exp_avg_sqs[tensor]) + i;
      widen_all(narrow_m, m, count), widen_all(narrow_v, v, count);
    } else {
      m = data<float>(lists.exp_avgs[tensor]) + i, v = data<float>(lists.exp_avg_sqs[tensor]) + i;
    }
    auto average = [&](size_t k) { return data<float>(lists.emas[k][tensor]) + i; };
    auto rate = [&](size_t k) { return float(1.0 - lists.decays[k]); };
    if (averages > 0)
      adamw_average_all(p, g, m, v, average(0), rate(0), divisor, scalars, count);
    else
      adamw_all(p, g, m, v, divisor, scalars, count);
    for (size_t k = 1; k < averages; ++k) average_all(average(k), p, rate(k), count);
    if (h.stochastic) round_moments(m, v, narrow_m, narrow_v, h, tensor, lists.offset(tensor) + i, count);
    if (!lists.copies.empty()) round_all(p, data<bf16>(lists.copies[tensor]) + i, count);
  }
}

void adamw_ema_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensor steps, Tensors emas,
                Tensors copies, std::optional<Tensor> divisor, std::optional<Tensor> skip, std::vector<double> decays,
                std::vector<int64_t> offsets, double lr, double beta1, double beta2, double eps, double weight_decay,
                int64_t seed, int64_t step) {
  Lists lists = check_lists(params, grads, exp_avgs, exp_avg_sqs, steps, emas, copies, divisor, skip, decays, offsets,
                            beta1, beta2, step);
  if (params.empty() || (skip && *data<float>(*skip) != 0)) return;
  Hyper h{lr, beta1, beta2, eps, weight_decay, uint64_t(seed), uint32_t(step),
          exp_avgs[0].scalar_type() == ScalarType::BFloat16};
  std::vector<AdamW> scalars;
  for (size_t i = 0; i < params.size(); ++i)
    scalars.push_back(adamw_scalars(lr, beta1, beta2, eps, weight_decay, double(data<float>(steps)[i] += 1.0f)));
  float divided_by = divisor ? *data<float>(*divisor) : 1.0f;
  for_each_chunk(chunks_of(params), [&](int64_t, const Chunk& chunk) {
    update_chunk(lists, h, scalars[chunk.tensor], divided_by, chunk);
  });
}

}  // namespace
}  // namespace sitfast

STABLE_TORCH_LIBRARY_IMPL(sitfast, CPU, library) {
  library.impl("gradient_norm", TORCH_BOX(&sitfast::gradient_norm));
  library.impl("adamw_ema_", TORCH_BOX(&sitfast::adamw_ema_));
}
