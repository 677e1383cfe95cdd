// Passes of the graph layer for one instruction set. native.cpp includes this file once for each,
// with
//   ISA      the name of the namespace
//   TARGET   the attribute that allows the instructions
//   LANES    floats in a vector

namespace ISA {

#define INLINE TARGET inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * LANES)));

template <class V>
INLINE V load(const float* p) {
  V x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// STREAM writes past the caches: what is written is not needed soon, and need not be read first.
template <bool STREAM, class V>
INLINE void store(float* p, V value) {
#if X86
  if constexpr (STREAM && sizeof(value) % 16 == 0) {
    __m128i parts[sizeof(value) / 16];
    std::memcpy(parts, &value, sizeof(value));
    for (size_t i = 0; i < sizeof(value) / 16; ++i) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, parts[i]);
    }
    return;
  }
#endif
  std::memcpy(p, &value, sizeof(value));
}

// Rows to add up: number n is at base + index[n] * width, or at base + n * width without an index.
// With an index, rows up to `known` are asked for early.
struct Rows {
  const float* base;
  const int32_t* index;
  const float* weights;
  int64_t count, known;
};

// Entries i to i + PARTS * |V| - 1 of the weighted sum of rows.
template <int PARTS, bool STREAM, bool INDEX, class V>
INLINE void combine_at(const Rows& rows, int64_t width, int64_t i, const float* first,
                       const float* second, float* out) {
  constexpr int64_t SIZE = sizeof(V) / sizeof(float);
  V sums[PARTS] = {};
  if (first) {
    for (int part = 0; part < PARTS; ++part) {
      const int64_t at = i + part * SIZE;
      sums[part] = load<V>(first + at) + load<V>(second + at);
    }
  }
  for (int64_t n = 0; n < rows.count; ++n) {
    const float* const row = rows.base + (INDEX ? rows.index[n] : n) * width + i;
    const float weight = rows.weights[n];
    for (int part = 0; part < PARTS; ++part) sums[part] += weight * load<V>(row + part * SIZE);
    if (INDEX && n + AHEAD < rows.known) {
      const float* const later = rows.base + int64_t{rows.index[n + AHEAD]} * width + i;
      for (int part = 0; part < PARTS; ++part) __builtin_prefetch(later + part * SIZE);
    }
  }
  for (int part = 0; part < PARTS; ++part) store<STREAM>(out + i + part * SIZE, sums[part]);
}

// The weighted sum of rows, and of the rows `first` and `second` where these are given.
template <bool STREAM, bool INDEX>
INLINE void combine(const Rows& rows, int64_t width, const float* first, const float* second,
                    float* out) {
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    combine_at<4, STREAM, INDEX, Vec>(rows, width, i, first, second, out);
  }
  for (; i + LANES <= width; i += LANES) {
    combine_at<1, STREAM, INDEX, Vec>(rows, width, i, first, second, out);
  }
  for (; i < width; ++i) combine_at<1, false, INDEX, float>(rows, width, i, first, second, out);
}

// Messages of the groups of a block of nodes: sum_b att[r, b] basis[j, b].
template <bool STREAM>
TARGET void mix(const Problem& p, int64_t block, float*) {
  const int64_t end = std::min(p.nodes, (block + 1) * BLOCK);
  for (int64_t j = block * BLOCK; j < end; ++j) {
    const float* const bases = p.basis + j * p.bases * p.width;
    for (int64_t g = p.node_groups[j]; g < p.node_groups[j + 1]; ++g) {
      const float* const weights = p.att + p.group_relation[g] * p.bases;
      const Rows rows = {bases, nullptr, weights, p.bases, 0};
      combine<STREAM, false>(rows, p.width, nullptr, nullptr, p.messages + g * p.width);
    }
  }
}

// Outputs of a block of nodes: root, bias and the weighted messages that reach them.
TARGET void gather(const Problem& p, int64_t block, float*) {
  const int64_t end = std::min(p.nodes, (block + 1) * BLOCK);
  for (int64_t i = block * BLOCK; i < end; ++i) {
    const int64_t first = p.row_edges[i];
    const Rows rows = {p.messages, p.row_group + first, p.row_weight + first,
                       p.row_edges[i + 1] - first, p.edges - first};
    combine<false, true>(rows, p.width, p.root + i * p.width, p.bias, p.output + i * p.width);
  }
}

// sums += a * b, lane by lane.
INLINE Vec multiplied(const float* a, const float* b, int64_t width, Vec sum, float& rest) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) sum += load<Vec>(a + i) * load<Vec>(b + i);
  for (; i < width; ++i) rest += a[i] * b[i];
  return sum;
}

// Gradients of the bases of a block of nodes, and its part of the gradient of att. With D[g] the
// weighted gradients of the targets of group g: sum_g att[r, b] D[g], and the product of D[g] with
// basis b.
template <bool STREAM>
TARGET void backward(const Problem& p, int64_t block, float* scratch) {
  const int64_t B = p.bases, pairs = p.relations * B;
  float* const D = scratch;
  float* const weights = D + p.relations * p.width;
  float* const products = weights + pairs;
  std::memset(products, 0, sizeof(float) * pairs * LANES);
  const int64_t end = std::min(p.nodes, (block + 1) * BLOCK);
  for (int64_t j = block * BLOCK; j < end; ++j) {
    const int64_t begin = p.node_groups[j], groups = p.node_groups[j + 1] - begin;
    const int32_t* const relation = p.group_relation + begin;
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t first = p.group_edges[begin + k];
      const Rows rows = {p.grad, p.edge_target + first, p.edge_weight + first,
                         p.group_edges[begin + k + 1] - first, p.edges - first};
      combine<false, true>(rows, p.width, nullptr, nullptr, D + k * p.width);
      for (int64_t b = 0; b < B; ++b) weights[b * groups + k] = p.att[relation[k] * B + b];
    }
    for (int64_t b = 0; b < B; ++b) {
      const int64_t at = (j * B + b) * p.width;
      const Rows rows = {D, nullptr, weights + b * groups, groups, 0};
      combine<STREAM, false>(rows, p.width, nullptr, nullptr, p.grad_basis + at);
      for (int64_t k = 0; k < groups; ++k) {
        float* const sums = products + (relation[k] * B + b) * LANES;
        float rest = 0;
        Vec sum = multiplied(D + k * p.width, p.basis + at, p.width, load<Vec>(sums), rest);
        sum[0] += rest;
        store<false>(sums, sum);
      }
    }
  }
  for (int64_t i = 0; i < pairs; ++i) {
    double sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += products[i * LANES + lane];
    p.grad_att[block * pairs + i] = sum;
  }
}

TARGET void mix_any(const Problem& p, int64_t block, float* scratch) {
  (p.stream ? mix<true> : mix<false>)(p, block, scratch);
}

TARGET void backward_any(const Problem& p, int64_t block, float* scratch) {
  (p.stream ? backward<true> : backward<false>)(p, block, scratch);
}

const Level LEVEL = {mix_any, gather, backward_any, LANES};
#undef INLINE

}  // namespace ISA
