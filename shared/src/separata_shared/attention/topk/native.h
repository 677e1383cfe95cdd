// What the kernels of every instruction set share: the problem, and what a task leaves behind.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

struct Bf16 {
  uint16_t bits;
};

// Mirrored by class Problem in native.py. Strides count elements; widths are contiguous.
struct Problem {
  int64_t batch, num_heads, num_kv_heads, target, source, width, value_width;
  const void *query, *key, *value;                // (B, H, T, D), (B, H_kv, S, D), (B, H_kv, S, D_v)
  int64_t query_stride[3], key_stride[3], value_stride[3];
  const bool* mask;                               // (B, H, T, S) or null
  int64_t mask_stride[4];
  const float* bias;                              // (B, H, T, S) or null
  int64_t bias_stride[4];
  const int64_t* top_k;                           // (B, H, T)
  int64_t top_k_stride[3], most_keys;
  int64_t causal, exact_ties, seed, threads, level, is_bf16;
  double dropout;
  void* output;                                   // (B, H, T, D_v)
  int64_t output_stride[3];
};

// Mirrored by class Gradients in native.py. Entries are the kept keys, row by row.
struct Gradients {
  const int32_t *offsets, *columns;               // (B H T + 1,), (N,)
  const float* weights;                           // (N,), before dropout
  float* scores;                                  // (N,): gradients of the kept scores
  const void* output;                             // (B, H, T, D_v): gradient of the output
  int64_t output_stride[3];
  void *query, *key, *value;
  int64_t query_stride[3], key_stride[3], value_stride[3];
};

// Rows first to last - 1 of the queries that share a key head. A row is a query of one head.
struct Task {
  int64_t batch, kv_head, first, last;
};

// Kept keys of the rows of a task.
struct Kept {
  std::vector<int32_t> counts, columns;
  std::vector<float> weights;
  int64_t entries = 0;

  void expect(int64_t rows, int64_t size) {
    counts.reserve(rows);
    columns.resize(size);
    weights.resize(size);
  }

  // Ties may make more entries than expected.
  void add(const int32_t* row_columns, const float* row_weights, int64_t n) {
    if (entries + n > static_cast<int64_t>(columns.size())) {
      columns.resize(2 * columns.size() + n);
      weights.resize(2 * weights.size() + n);
    }
    std::copy(row_columns, row_columns + n, columns.begin() + entries);
    std::copy(row_weights, row_weights + n, weights.begin() + entries);
    entries += n;
    counts.push_back(static_cast<int32_t>(n));
  }
};

// Memory that starts on a cache line, for vectors of any width.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

inline int64_t up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

inline int64_t row_head(const Problem& p, const Task& task, int64_t row) {
  return task.kv_head * (p.num_heads / p.num_kv_heads) + row / p.target;
}

// Number of a row among all B H T.
inline int64_t row_number(const Problem& p, const Task& task, int64_t row) {
  return (task.batch * p.num_heads + task.kv_head * (p.num_heads / p.num_kv_heads)) * p.target + row;
}

template <class T>
inline T* at(T* data, const int64_t* stride, int64_t batch, int64_t head, int64_t time) {
  return data + batch * stride[0] + head * stride[1] + time * stride[2];
}

// The factor of a weight under dropout: a function of seed, row and key, so nothing is kept.
inline float dropout_factor(const Problem& p, int64_t row, int64_t column) {
  uint64_t x = static_cast<uint64_t>(p.seed) + 0x9e3779b97f4a7c15ull * (row * p.source + column + 1);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;  // the finaliser of SplitMix64
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  x ^= x >> 31;
  const double uniform = static_cast<double>(x >> 11) * 0x1p-53;
  return uniform < p.dropout ? 0.0f : static_cast<float>(1.0 / (1.0 - p.dropout));
}

// What an instruction set offers; the first of each pair is for float, the second for bfloat16.
struct Level {
  void (*forward_task[2])(const Problem&, const Task&, Kept&);
  void (*backward_rows[2])(const Problem&, const Gradients&, const Task&, bool with_keys);
  void (*backward_keys[2])(const Problem&, const Gradients&, const Task&, int64_t, int64_t);
};

// Floats of a block of scores, which stay in the second-level cache; a larger block reads the packed
// keys less often. Where the system does not tell the size of that cache, it is taken for 1 MB.
inline int64_t block_scores() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t bytes = 0;
#endif
  constexpr int64_t USUAL = 1 << 20;
  return std::max(bytes, USUAL) * 3 / 8 / static_cast<int64_t>(sizeof(float));
}
