// The gradient norm, and AdamW with averages and bf16 copies, on the GPU: lists of tensors in one launch each.
//
// The addresses of the tensors travel as a kernel argument of up to 32 KB, so that a table on the device needs neither
// memory nor upkeep and is never stale: XL/2 with one average and bf16 copies takes 291 rows of 72 bytes, 21 KB. Longer lists take
// further launches. A block finds the tensor of its chunk by bisection of the rows. Everything is read and written in
// 16-byte accesses; unaligned tensors and tails go element by element.
#include "cuda.h"

namespace sitfast {
namespace {

// On an H100 97.6 % of the rate of a copy; neither two accesses of a thread in flight for each operand (97.6) nor blocks
// of 512 threads (97.6, with two averages 93.8) do better.
constexpr int kThreads = 256;
constexpr int64_t kChunk = 16384;
constexpr int kWords = 4080;  // with what else a launch passes, below the limit of 32,764 bytes

enum Column { kFirstChunk, kNumel, kPosition, kOffset, kPointers };
enum Pointer { kParam, kGrad, kExpAvg, kExpAvgSq, kCopy, kAverages };

/// Rows of words: the first chunk, the number of elements, the position in the lists, the index in the whole tensor of the
/// first element (of a shard), then pointers.
struct Table {
  int32_t rows, columns;
  uint64_t words[kWords];

  __device__ __forceinline__ uint64_t at(int row, int column) const { return words[row * columns + column]; }

  template <class T>
  __device__ __forceinline__ T* pointer(int row, int which) const {
    return reinterpret_cast<T*>(at(row, kPointers + which));
  }

  /// The row of a chunk: the last that begins at or before it.
  __device__ __forceinline__ int find(uint64_t chunk) const {
    int low = 0, high = rows - 1;
    while (low < high) {
      int middle = (low + high + 1) / 2;
      if (at(middle, kFirstChunk) <= chunk)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }

  __device__ __forceinline__ bool aligned(int row) const {
    uint64_t addresses = 0;
    for (int i = kPointers; i < columns; ++i) addresses |= at(row, i);
    return addresses % 16 == 0;
  }
};

/// Calls `launch(table, number of chunks, chunks before)` for as many rows as fit, until all non-empty tensors had one.
template <class Pointers, class Launch>
void for_each_table(const Tensors& tensors, int num_pointers, Pointers&& pointers, Launch&& launch) {
  static thread_local Table table;
  table.rows = 0, table.columns = kPointers + num_pointers;
  STD_TORCH_CHECK(table.columns <= kWords, "adamw_ema: ", num_pointers, " tensors for one parameter are too many");
  int64_t chunks = 0, before = 0;
  auto flush = [&] {
    if (table.rows > 0) launch(table, chunks, before);
    before += chunks, chunks = 0, table.rows = 0;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    int64_t count = tensors[i].numel(), needed = ceil_div(count, kChunk);
    if (count == 0) continue;
    if ((table.rows + 1) * table.columns > kWords || chunks + needed >= int64_t(1) << 31) flush();
    uint64_t* row = table.words + table.rows++ * table.columns;
    row[kFirstChunk] = chunks, row[kNumel] = count, row[kPosition] = i, row[kOffset] = 0;
    pointers(i, row);
    chunks += needed;
  }
  flush();
}

uint64_t address(const Tensor& tensor) { return reinterpret_cast<uint64_t>(tensor.mutable_data_ptr()); }

struct Span {
  int row;
  int64_t begin, count;
};

__device__ __forceinline__ Span span_of(const Table& table) {
  int row = table.find(blockIdx.x);
  int64_t begin = (blockIdx.x - int64_t(table.at(row, kFirstChunk))) * kChunk;
  int64_t left = int64_t(table.at(row, kNumel)) - begin;
  return {row, begin, left < kChunk ? left : kChunk};
}

// The norm ------------------------------------------------------------------------------------------------------------

template <class G>
__global__ void __launch_bounds__(kThreads) square_kernel(const __grid_constant__ Table table, float* partial) {
  Span span = span_of(table);
  const G* g = table.pointer<const G>(span.row, 0) + span.begin;
  int whole = table.aligned(span.row) ? int(span.count / 4 * 4) : 0;
  float sum = 0;
#pragma unroll 4
  for (int i = 4 * threadIdx.x; i < whole; i += 4 * kThreads) {
    float value[4];
    load_four(g + i, value);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += value[k] * value[k];
  }
  for (int i = whole + threadIdx.x; i < span.count; i += kThreads) {
    float value = widen(g[i]);
    sum += value * value;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(1024) norm_kernel(const float* partial, int64_t count, float* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += 1024) sum += double(partial[i]);
  sum = block_sum<1024>(sum);
  if (threadIdx.x == 0) *norm = float(sqrt(sum));
}

Tensor gradient_norm(Tensors grads) {
  STD_TORCH_CHECK(!grads.empty(), "gradient_norm: no gradients");
  check_list("gradient_norm", "grads", grads, grads);
  check_dtype("gradient_norm", "grads", grads, true, true);
  OnDevice on(grads[0]);
  cudaStream_t stream = stream_of(grads[0]);
  int64_t total = 0;
  for (const Tensor& g : grads) total += ceil_div(g.numel(), kChunk);
  Tensor partial = empty_like(grads[0], {total}, ScalarType::Float), norm = empty_like(grads[0], {}, ScalarType::Float);
  for_each_table(
      grads, 1, [&](size_t i, uint64_t* row) { row[kPointers] = address(grads[i]); },
      [&](const Table& table, int64_t chunks, int64_t before) {
        auto kernel = grads[0].scalar_type() == ScalarType::Float ? square_kernel<float> : square_kernel<bf16>;
        kernel<<<chunks, kThreads, 0, stream>>>(table, data<float>(partial) + before);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
  norm_kernel<<<1, 1024, 0, stream>>>(data<float>(partial), total, data<float>(norm));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return norm;
}

// The update ----------------------------------------------------------------------------------------------------------

/// What a launch needs beside the table; the rates are 1 − decay.
struct Update {
  const AdamW* scalars;
  const float *divisor, *skip, *rates;
  uint64_t seed;
  uint32_t step;
  int32_t num_averages;
  bool copies;
};

struct Rates {
  float value[64];
  int count;
};

/// Counts the update, and evaluates once a tensor what its blocks would evaluate over and over.
__global__ void scalars_kernel(float* steps, AdamW* scalars, float* rates, const float* skip, int64_t count, Hyper h,
                               const __grid_constant__ Rates given) {
  int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < given.count) rates[i] = given.value[i];
  if (i >= count || (skip && *skip != 0.0f)) return;
  float step = steps[i] + 1.0f;
  steps[i] = step;
  scalars[i] = adamw_scalars(h.lr, h.beta1, h.beta2, h.eps, h.weight_decay, double(step));
}

__device__ __forceinline__ void narrow_moments(float* m_out, float* v_out, const float (&m)[4], const float (&v)[4],
                                               const Words&) {
  store_four(m_out, m), store_four(v_out, v);
}

__device__ __forceinline__ void narrow_moments(bf16* m_out, bf16* v_out, const float (&m)[4], const float (&v)[4],
                                               const Words& random) {
  Four<bf16> m4, v4;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    m4.value[k] = stochastic_bf16(m[k], random.word[k]);
    v4.value[k] = stochastic_bf16(v[k], random.word[k] >> 16);
  }
  *reinterpret_cast<Four<bf16>*>(m_out) = m4, *reinterpret_cast<Four<bf16>*>(v_out) = v4;
}

__device__ __forceinline__ void narrow_moment(float* m_out, float* v_out, float m, float v, uint32_t) {
  *m_out = m, *v_out = v;
}

__device__ __forceinline__ void narrow_moment(bf16* m_out, bf16* v_out, float m, float v, uint32_t random) {
  *m_out = stochastic_bf16(m, random), *v_out = stochastic_bf16(v, random >> 16);
}

/// Words of the elements 4 block … of a tensor; only bf16 moments draw.
template <class M>
__device__ __forceinline__ Words draw(const Update& u, uint64_t position, int64_t block) {
  if constexpr (sizeof(M) == 2) return philox(u.seed, position, kRounding | u.step << 8, uint32_t(block));
  return Words{};
}

__device__ __forceinline__ void move_average(float (&average)[4], const float (&p)[4], float rate) {
#pragma unroll
  for (int i = 0; i < 4; ++i) average[i] += rate * (p[i] - average[i]);
}

/// `averages` in registers: 0, 1 or 2 of them, loaded with the rest; those beyond are loaded when p is known.
template <class G, class M, int averages>
__global__ void __launch_bounds__(kThreads, 3) update_kernel(const __grid_constant__ Table table,
                                                          const __grid_constant__ Update u) {
  if (u.skip && *u.skip != 0.0f) return;
  Span span = span_of(table);
  int row = span.row;
  uint64_t position = table.at(row, kPosition);
  int64_t element = int64_t(table.at(row, kOffset)) + span.begin;  // of the whole tensor, the first of this chunk
  AdamW scalars = u.scalars[position];
  bool divides = u.divisor != nullptr;
  float divisor = divides ? *u.divisor : 1.0f, rates[averages + 1];
#pragma unroll
  for (int k = 0; k < averages; ++k) rates[k] = u.rates[k];
  float* p = table.pointer<float>(row, kParam) + span.begin;
  const G* g = table.pointer<const G>(row, kGrad) + span.begin;
  M* m = table.pointer<M>(row, kExpAvg) + span.begin;
  M* v = table.pointer<M>(row, kExpAvgSq) + span.begin;
  bf16* copy = u.copies ? table.pointer<bf16>(row, kCopy) + span.begin : nullptr;
  bool aligned = table.aligned(row) && (sizeof(M) == 4 || element % 4 == 0);
  int whole = aligned ? int(span.count / 4 * 4) : 0;

  for (int at = 4 * threadIdx.x; at < whole; at += 4 * kThreads) {
    float p4[4], g4[4], m4[4], v4[4], average4[averages + 1][4];
    load_four(p + at, p4), load_four(g + at, g4), load_four(m + at, m4), load_four(v + at, v4);
#pragma unroll
    for (int k = 0; k < averages; ++k)
      load_four(table.pointer<float>(row, kAverages + k) + span.begin + at, average4[k]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (divides) g4[i] = g4[i] / divisor;
      adamw(p4[i], g4[i], m4[i], v4[i], scalars);
    }
    store_four(p + at, p4);
    narrow_moments(m + at, v + at, m4, v4, draw<M>(u, position, (element + at) / 4));
    if (copy) store_four(copy + at, p4);
#pragma unroll
    for (int k = 0; k < averages; ++k) {
      move_average(average4[k], p4, rates[k]);
      store_four(table.pointer<float>(row, kAverages + k) + span.begin + at, average4[k]);
    }
    for (int k = averages; k < u.num_averages; ++k) {
      float* average = table.pointer<float>(row, kAverages + k) + span.begin + at;
      float value[4];
      load_four(average, value);
      move_average(value, p4, u.rates[k]);
      store_four(average, value);
    }
  }

  for (int at = whole + threadIdx.x; at < span.count; at += kThreads) {
    float p1 = p[at], g1 = widen(g[at]), m1 = widen(m[at]), v1 = widen(v[at]);
    if (divides) g1 = g1 / divisor;
    adamw(p1, g1, m1, v1, scalars);
    p[at] = p1;
    narrow_moment(m + at, v + at, m1, v1, draw<M>(u, position, (element + at) / 4).at(element + at));
    if (copy) copy[at] = nearest_bf16(p1);
    for (int k = 0; k < u.num_averages; ++k) {
      float* average = table.pointer<float>(row, kAverages + k) + span.begin + at;
      *average += u.rates[k] * (p1 - *average);
    }
  }
}

template <class G, class M>
auto choose(size_t averages) {
  return averages == 0 ? update_kernel<G, M, 0> : averages == 1 ? update_kernel<G, M, 1> : update_kernel<G, M, 2>;
}

void adamw_ema_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensor steps, Tensors emas,
                Tensors copies, std::optional<Tensor> divisor, std::optional<Tensor> skip, std::vector<double> decays,
                std::vector<int64_t> offsets, double lr, double beta1, double beta2, double eps, double weight_decay, int64_t seed, int64_t step) {
  Lists lists = check_lists(params, grads, exp_avgs, exp_avg_sqs, steps, emas, copies, divisor, skip, decays, offsets,
                            beta1, beta2, step);
  if (params.empty()) return;
  OnDevice on(params[0]);
  cudaStream_t stream = stream_of(params[0]);
  int64_t count = int64_t(params.size());
  int averages = int(decays.size());
  STD_TORCH_CHECK(averages <= 64, "adamw_ema: ", averages, " averages, at most 64 are kept");

  int64_t floats = count * int64_t(sizeof(AdamW) / sizeof(float));
  Tensor workspace = empty_like(params[0], {floats + averages}, ScalarType::Float);
  AdamW* scalars = reinterpret_cast<AdamW*>(workspace.mutable_data_ptr());
  float* rates = data<float>(workspace) + floats;
  const float* skip_at = skip ? data<float>(*skip) : nullptr;
  Hyper h{lr, beta1, beta2, eps, weight_decay, 0, 0, false};
  Rates given{};
  given.count = averages;
  for (int k = 0; k < averages; ++k) given.value[k] = float(1.0 - decays[k]);
  scalars_kernel<<<ceil_div(count, 128), 128, 0, stream>>>(data<float>(steps), scalars, rates, skip_at, count, h, given);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  Update u{scalars, divisor ? data<float>(*divisor) : nullptr, skip_at, rates, uint64_t(seed), uint32_t(step), averages,
           !copies.empty()};
  bool wide_g = grads[0].scalar_type() == ScalarType::Float, wide_m = exp_avgs[0].scalar_type() == ScalarType::Float;
  auto kernel = wide_g ? (wide_m ? choose<float, float>(averages) : choose<float, bf16>(averages))
                       : (wide_m ? choose<bf16, float>(averages) : choose<bf16, bf16>(averages));
  for_each_table(
      params, kAverages + averages,
      [&](size_t i, uint64_t* row) {
        row[kOffset] = lists.offset(i);
        uint64_t* to = row + kPointers;
        to[kParam] = address(params[i]), to[kGrad] = address(grads[i]);
        to[kExpAvg] = address(exp_avgs[i]), to[kExpAvgSq] = address(exp_avg_sqs[i]);
        to[kCopy] = copies.empty() ? 0 : address(copies[i]);
        for (int k = 0; k < averages; ++k) to[kAverages + k] = address(lists.emas[k][i]);
      },
      [&](const Table& table, int64_t chunks, int64_t) {
        kernel<<<chunks, kThreads, 0, stream>>>(table, u);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

}  // namespace
}  // namespace sitfast

STABLE_TORCH_LIBRARY_IMPL(sitfast, CUDA, library) {
  library.impl("gradient_norm", TORCH_BOX(&sitfast::gradient_norm));
  library.impl("adamw_ema_", TORCH_BOX(&sitfast::adamw_ema_));
}
