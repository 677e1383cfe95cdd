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

// Mirrored by class Problem in native.py. Rows (R, H) are contiguous.
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

// In double precision, for rows whose sums overflow.
Statistics large_statistics(const float* row, int64_t width, double denominator) {
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

const char* const NAMES[] = {"plain", "avx2", "avx512"};

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
    run(p, p.rows * i / threads, p.rows * (i + 1) / threads, p.scratch + i * p.width);
#if X86
    _mm_sfence();  // what was streamed must be seen by other threads
#endif
  }
}

}  // namespace

extern "C" {

// The best set of instructions of this machine: a number for Problem.level.
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

const char* norm_level_name(int64_t level) { return NAMES[level]; }

void norm_forward(const Problem* p) {
  for_rows(*p, level_of(*p).forward[p->is_bf16][p->residual != nullptr][p->stream]);
}

void norm_backward(const Problem* p) {
  for_rows(*p, level_of(*p).backward[p->is_bf16][p->grad_total != nullptr][p->stream]);
}

}  // extern "C"
