// Exact top-k attention on a CPU: the entry points, the choice of instructions and of tasks.
//
// For each row of scores only the few largest matter. Scores of a block of rows are made panel by
// panel of keys; while they are in registers, maxima over groups of keys are kept. k groups have a
// score of at least the k-th largest maximum, so that is a lower bound of the k-th largest score,
// and one pass of comparisons finds the few candidates above it. The rest of the forward and the
// whole backward touch the kept keys only.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "native.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#else
#define X86 0
#endif

#define ISA plain
#define TARGET
#define LANES 4
#define ROWS 6
#define VECTORS 2
#define PAIRS 0
#include "native_kernel.h"
#undef ISA
#undef TARGET
#undef LANES
#undef VECTORS

#if X86
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,popcnt,bmi")))
#define LANES 8
#define VECTORS 2
#include "native_kernel.h"
#undef ISA
#undef TARGET
#undef LANES
#undef VECTORS

#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt,bmi")))
#define LANES 16
#define VECTORS 4
#include "native_kernel.h"
#undef ISA
#undef TARGET
#undef PAIRS

#define ISA avx512_bf16
#define TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt,bmi")))
#define PAIRS 1
#include "native_kernel.h"
#endif

namespace {

const char* const NAMES[] = {"plain", "avx2", "avx512", "avx512_bf16"};

const Level& level_of(const Problem& p) {
#if X86
  if (p.level == 1) return avx2::LEVEL;
  if (p.level == 2) return avx512::LEVEL;
  if (p.level == 3) return avx512_bf16::LEVEL;
#endif
  return plain::LEVEL;
}

struct Result {
  std::vector<Kept> tasks;
  std::vector<int64_t> first_row;
  int64_t rows = 0, entries = 0;
};

// Runs a function for each task on all threads; false if memory ran out.
template <class Function>
bool for_each_task(int64_t tasks, int64_t threads, const Function& run) {
  bool enough = true;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (tasks > 1 && threads > 1)
  for (int64_t i = 0; i < tasks; ++i) {
    try {
      run(i);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      enough = false;
    }
  }
  return enough;
}

// Rows of a key head in several tasks where there are fewer heads than threads need. Each task
// packs the keys for itself, which costs little from a few hundred rows on.
std::vector<Task> tasks_of(const Problem& p) {
  const int64_t rows = p.num_heads / p.num_kv_heads * p.target, heads = p.batch * p.num_kv_heads;
  const int64_t wanted = p.threads > 1 ? (4 * p.threads + heads - 1) / heads : 1;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, rows / 256));
  std::vector<Task> tasks;
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t i = 0; i < parts; ++i) {
      tasks.push_back({head / p.num_kv_heads, head % p.num_kv_heads, rows * i / parts,
                       rows * (i + 1) / parts});
    }
  }
  return tasks;
}

}  // namespace

extern "C" {

// The best set of instructions of this machine: a number for Problem.level.
int64_t topk_best_level() {
#if X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

const char* topk_level_name(int64_t level) { return NAMES[level]; }

// Writes the output and keeps the entries; null if memory ran out. topk_entries takes them.
void* topk_forward(const Problem* p, int64_t* entries) {
  try {
    auto result = std::make_unique<Result>();
    const std::vector<Task> tasks = tasks_of(*p);
    result->tasks.resize(tasks.size());
    const auto run = level_of(*p).forward_task[p->is_bf16];
    if (!for_each_task(tasks.size(), p->threads,
                       [&](int64_t i) { run(*p, tasks[i], result->tasks[i]); })) {
      return nullptr;
    }
    for (size_t i = 0; i < tasks.size(); ++i) {
      result->first_row.push_back(row_number(*p, tasks[i], tasks[i].first));
      result->entries += result->tasks[i].entries;
    }
    *entries = result->entries;
    return result.release();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

// Copies the entries of topk_forward and frees them. Without a place to copy to it only frees.
void topk_entries(void* kept, int32_t* offsets, int32_t* columns, float* weights) {
  const std::unique_ptr<Result> result(static_cast<Result*>(kept));
  if (!offsets) return;
  int64_t entry = 0, row = 0;  // tasks are in the order of the rows
  offsets[0] = 0;
  for (const Kept& task : result->tasks) {
    std::copy_n(task.columns.begin(), task.entries, columns + entry);
    std::copy_n(task.weights.begin(), task.entries, weights + entry);
    for (const int32_t n : task.counts) offsets[++row] = static_cast<int32_t>(entry += n);
  }
}

// Writes the gradients; 0 if memory ran out. A task for each head, or, where there are fewer heads
// than threads, first tasks of rows and then tasks of keys.
int topk_backward(const Problem* p, const Gradients* g) {
  try {
    const Level& level = level_of(*p);
    const int64_t heads = p->batch * p->num_kv_heads;
    const int64_t parts = std::min(p->source, (p->threads + heads - 1) / heads);
    const int64_t all_rows = p->num_heads / p->num_kv_heads * p->target;
    const auto rows = level.backward_rows[p->is_bf16];
    const auto keys = level.backward_keys[p->is_bf16];
    std::vector<Task> tasks;
    for (int64_t head = 0; head < heads; ++head) {
      tasks.push_back({head / p->num_kv_heads, head % p->num_kv_heads, 0, all_rows});
    }
    if (parts == 1) {
      return for_each_task(heads, p->threads, [&](int64_t i) { rows(*p, *g, tasks[i], true); });
    }
    const std::vector<Task> some = tasks_of(*p);
    return for_each_task(some.size(), p->threads,
                         [&](int64_t i) { rows(*p, *g, some[i], false); }) &&
           for_each_task(heads * parts, p->threads, [&](int64_t i) {
             const int64_t part = i % parts;
             keys(*p, *g, tasks[i / parts], p->source * part / parts,
                  p->source * (part + 1) / parts);
           });
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

}  // extern "C"
