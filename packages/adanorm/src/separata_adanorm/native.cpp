// The norms of AdaNorm's family on a CPU: one pass over memory forward and one backward.
//
// A row is read into the cache once. Its statistics take two passes there, so no square of a large
// mean is ever subtracted, and what the backward needs besides x are two numbers of each row.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#else
#define X86 0
#endif
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

struct Bf16 {
  uint16_t bits;
};

// Rows (R, H) are contiguous.
struct Problem {
  int64_t rows, width;
  int64_t official, detach_mean, detach_std;
  int64_t is_bf16, stream, threads, level;
  double C, k, eps;
  const void *x, *residual;     // the residual or null
  const void *grad, *grad_total;  // of the output and, with a residual, of the sum
  void *output, *total;         // the norm or the gradient; x + residual or null
  float *mean, *sigma;          // (R,)
  float* scratch;               // (threads, H)
};

struct Statistics {
  float mean, sigma;
};

using Rows = void (*)(const Problem&, int64_t first, int64_t last, float* scratch);

// By bfloat16, residual, stream.
struct Level {
  Rows forward[2][2][2], backward[2][2][2];
};

constexpr float LARGEST = std::numeric_limits<float>::max();
// Of a variance, below which squares lose digits; that is seen only beside an eps as small.
constexpr float SMALLEST = 1e-30f;
constexpr double SMALL_EPS = 1e-15;

// In double precision, for rows whose sums overflow or whose squares vanish.
Statistics wide_statistics(const float* row, int64_t width, double denominator) {
  double mean = 0, squares = 0;
  for (int64_t i = 0; i < width; ++i) mean += row[i];
  mean /= width;
  for (int64_t i = 0; i < width; ++i) squares += (row[i] - mean) * (row[i] - mean);
  return {static_cast<float>(mean), static_cast<float>(std::sqrt(squares / denominator))};
}

// What a row is divided by.
inline float spread(const Problem& p, float sigma) {
  if (p.official) return sigma + static_cast<float>(p.eps);
  return static_cast<float>(std::sqrt(static_cast<double>(sigma) * sigma + p.eps));
}

}  // namespace

#define ISA plain
#define TARGET
#define LANES 4
#include "native_kernel.h"
#undef ISA
#undef TARGET
#undef LANES

#if X86
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#include "native_kernel.h"
#undef ISA
#undef TARGET
#undef LANES

#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define LANES 16
#include "native_kernel.h"
#endif

namespace {

const Level& level_of(const Problem& p) {
#if X86
  if (p.level == 1) return avx2::LEVEL;
  if (p.level == 2) return avx512::LEVEL;
#endif
  return plain::LEVEL;
}

// Runs a function for the rows of each thread.
void for_rows(const Problem& p, Rows run) {
  const int64_t threads = p.threads < p.rows ? p.threads : p.rows;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < threads; ++i) {
    float* const scratch = p.scratch ? p.scratch + i * p.width : nullptr;
    run(p, p.rows * i / threads, p.rows * (i + 1) / threads, scratch);
#if X86
    _mm_sfence();  // what was streamed must be seen by other threads
#endif
  }
}

}  // namespace

extern "C" {

// The best set of instructions of this machine: 0 is plain, 1 AVX2 and 2 AVX-512.
int64_t norm_best_level() {
#if X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// Writes the norm and, with a residual, the sum; mean and deviation of each row into statistics
// (2, R). Scratch (threads, H) is needed for a residual and for bfloat16.
void norm_forward(const void* x, const void* residual, void* output, void* total,
                  float* statistics, float* scratch, int64_t rows, int64_t width, double C,
                  double k, double eps, int64_t official, int64_t is_bf16, int64_t stream,
                  int64_t threads, int64_t level) {
  Problem p = {};
  p.rows = rows, p.width = width, p.C = C, p.k = k, p.eps = eps, p.official = official;
  p.is_bf16 = is_bf16, p.stream = stream, p.threads = threads, p.level = level;
  p.x = x, p.residual = residual, p.output = output, p.total = total, p.scratch = scratch;
  p.mean = statistics, p.sigma = statistics + rows;
  for_rows(p, level_of(p).forward[is_bf16][residual != nullptr][stream]);
}

// Writes the gradient of x; grad_total, of the sum, is null without a residual.
void norm_backward(const void* grad, const void* grad_total, const void* x, float* statistics,
                   void* output, int64_t rows, int64_t width, double C, double k, double eps,
                   int64_t official, int64_t detach_mean, int64_t detach_std, int64_t is_bf16,
                   int64_t stream, int64_t threads, int64_t level) {
  Problem p = {};
  p.rows = rows, p.width = width, p.C = C, p.k = k, p.eps = eps, p.official = official;
  p.detach_mean = detach_mean, p.detach_std = detach_std;
  p.is_bf16 = is_bf16, p.stream = stream, p.threads = threads, p.level = level;
  p.grad = grad, p.grad_total = grad_total, p.x = x, p.output = output;
  p.mean = statistics, p.sigma = statistics + rows;
  for_rows(p, level_of(p).backward[is_bf16][grad_total != nullptr][stream]);
}

}  // extern "C"
