// Top-k attention for one instruction set. native.cpp includes this file once for each, with
//   ISA      the name of the namespace
//   TARGET   the attribute that allows the instructions
//   LANES    floats in a vector
//   ROWS     query rows in a tile of scores
//   VECTORS  vectors of keys in a tile
//   PAIRS    1 where products of two bfloat16 are summed in one instruction

#include "native_vectors.h"

namespace ISA {

// ---------------------------------------------------------------- scores of panels of keys

// A unit is what one step of a product reads of a key: a float, or a pair of bfloat16.
struct Single {
  static constexpr int WIDTH = 1;
  template <class T>
  INLINE static Vec units(const T* p) { return load(p); }
  template <class T>
  INLINE static float unit(const T* p, int64_t) { return get(p); }
  INLINE static Vec step(Vec total, Vec a, Vec b) { return total + a * b; }
};

#if PAIRS
struct Pair {
  static constexpr int WIDTH = 2;
  INLINE static Vec units(const Bf16* p) { return load(reinterpret_cast<const float*>(p)); }
  INLINE static float unit(const Bf16* p, int64_t left) {
    const uint32_t bits = p[0].bits | (left > 1 ? static_cast<uint32_t>(p[1].bits) << 16 : 0);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  INLINE static Vec step(Vec total, Vec a, Vec b) {
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(total),
                                                  reinterpret_cast<__m512bh>(a),
                                                  reinterpret_cast<__m512bh>(b)));
  }
};
#endif

template <class T>
struct StepOf {
  using type = Single;
};
#if PAIRS
template <>
struct StepOf<Bf16> {
  using type = Pair;
};
#endif

template <int HALF>
INLINE void exchange(Vec* x) {
  Ints low, high;
  for (int i = 0; i < LANES; ++i) {
    low[i] = i & HALF ? LANES + i - HALF : i;
    high[i] = i & HALF ? LANES + i : i + HALF;
  }
  for (int i = 0; i < LANES; ++i) {
    if (i & HALF) continue;
    const Vec a = x[i], b = x[i + HALF];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + HALF] = __builtin_shuffle(a, b, high);
  }
}

INLINE void transpose(Vec* x) {
  exchange<1>(x);
  exchange<2>(x);
#if LANES >= 8
  exchange<4>(x);
#endif
#if LANES >= 16
  exchange<8>(x);
#endif
}

// Keys first to first + n - 1 as a panel (units, PANEL); keys that do not exist are zero.
template <class T>
TARGET void pack(const T* key, int64_t stride, int64_t n, int64_t width, float* panel) {
  using Step = typename StepOf<T>::type;
  const int64_t units = (width + Step::WIDTH - 1) / Step::WIDTH;
  for (int64_t j = 0; j < PANEL; j += LANES) {
    if (j >= n) break;  // no tile reads these lanes
    int64_t u = 0;
    for (; j + LANES <= n && (u + LANES) * Step::WIDTH <= width; u += LANES) {
      Vec block[LANES];
      for (int i = 0; i < LANES; ++i) {
        block[i] = Step::units(key + (j + i) * stride + u * Step::WIDTH);
      }
      transpose(block);
      for (int i = 0; i < LANES; ++i) store(panel + (u + i) * PANEL + j, block[i]);
    }
    for (; u < units; ++u) {
      for (int i = 0; i < LANES; ++i) {
        const int64_t d = u * Step::WIDTH;
        panel[u * PANEL + j + i] = j + i < n ? Step::unit(key + (j + i) * stride + d, width - d) : 0;
      }
    }
  }
}

// Scores of R rows and V vectors of keys. A maximum stands for the keys of one lane.
template <class Step, int R, int V>
TARGET void tile(const float* query, int64_t units, const float* panel, float scale, float* scores,
                 int64_t stride, float* maxima, int64_t maxima_stride) {
  Vec total[R][V] = {};
  for (int64_t u = 0; u < units; ++u) {
    Vec key[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) key[v] = load(panel + u * PANEL + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec q = all(query[r * units + u]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) total[r][v] = Step::step(total[r][v], key[v], q);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Vec most = all(LOWEST);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec score = total[r][v] * scale;
      store(scores + r * stride + v * LANES, score);
      most = v ? larger(most, score) : score;
    }
    for (int v = V; v < VECTORS; ++v) store(scores + r * stride + v * LANES, all(LOWEST));
    store(maxima + r * maxima_stride, most);
  }
}

template <class Step, int R>
TARGET void tile_of(int64_t vectors, const float* query, int64_t units, const float* panel,
                    float scale, float* scores, int64_t stride, float* maxima, int64_t step) {
  switch (vectors) {
    case 1: return tile<Step, R, 1>(query, units, panel, scale, scores, stride, maxima, step);
#if VECTORS > 2
    case 2: return tile<Step, R, 2>(query, units, panel, scale, scores, stride, maxima, step);
    case 3: return tile<Step, R, 3>(query, units, panel, scale, scores, stride, maxima, step);
#endif
    default: return tile<Step, R, VECTORS>(query, units, panel, scale, scores, stride, maxima, step);
  }
}

// ---------------------------------------------------------------- selection in a row of scores

TARGET int64_t count(const float* values, int64_t vectors, float t) {
  int64_t found = 0;
  for (int64_t i = 0; i < vectors; ++i) {
    found += __builtin_popcount(at_least(load(values + i * LANES), all(t)));
  }
  return found;
}

// The k-th largest lane; equal ones all count.
TARGET float kth(Vec x, int64_t k) {
  Ints rank = {};  // how many lanes are larger
#pragma GCC unroll 16
  for (int shift = 1; shift < LANES; ++shift) {
    Ints turn;
    for (int i = 0; i < LANES; ++i) turn[i] = (i + shift) % LANES;
    rank -= __builtin_shuffle(x, turn) > x;
  }
  const Ints among = rank < static_cast<int32_t>(k);
  return -maximum(among ? -x : all(LOWEST));
}

// A number with at least k of the values, and at most k + slack where bisection finds one; the k-th
// largest value if there is one vector. If fewer than k are above -inf, it lies below them all.
TARGET float bound(const float* values, int64_t vectors, int64_t k, int64_t slack) {
  constexpr float FINITE = std::numeric_limits<float>::max();
  if (vectors * LANES < k) return -FINITE;
  if (vectors == 1) return std::max(kth(load(values), k), -FINITE);
  Vec most = all(LOWEST), least = all(-LOWEST);
  for (int64_t i = 0; i < vectors; ++i) {
    const Vec x = load(values + i * LANES);
    most = larger(most, x);
    const Vec finite = x > LOWEST ? x : all(-LOWEST);
    least = finite < least ? finite : least;
  }
  float low = -maximum(-least), high = maximum(most);
  int64_t above = count(values, vectors, low);
  if (above < k) return -FINITE;
  for (int step = 0; step < 24 && above > k + slack; ++step) {
    const float middle = 0.5f * low + 0.5f * high;
    if (!(middle > low && middle < high)) break;
    const int64_t found = count(values, vectors, middle);
    if (found >= k) {
      low = middle;
      above = found;
    } else {
      high = middle;
    }
  }
  return low;
}

INLINE Ints lanes_from(int64_t first) {
  Ints lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  return lanes + static_cast<int32_t>(first);
}

// Appends the lanes of a mask to n columns and scores; writes a whole vector, of which these count.
INLINE int64_t append(uint32_t mask, Ints lanes, Vec values, int64_t n, int32_t* columns,
                      float* scores) {
#if LANES == 16
  _mm512_storeu_si512(columns + n,
                      _mm512_maskz_compress_epi32(mask, reinterpret_cast<__m512i>(lanes)));
  _mm512_storeu_ps(scores + n, _mm512_maskz_compress_ps(mask, reinterpret_cast<__m512>(values)));
  return n + __builtin_popcount(mask);
#else
  for (; mask; mask &= mask - 1, ++n) {
    columns[n] = lanes[__builtin_ctz(mask)];
    scores[n] = values[__builtin_ctz(mask)];
  }
  return n;
#endif
}

// Appends the columns and scores of the values from begin to end - 1 that are at least t.
INLINE int64_t collect_lines(const float* values, int64_t begin, int64_t end, float t, int64_t n,
                             int32_t* columns, float* scores) {
  for (int64_t first = begin; first < end; first += LANES) {
    const Vec x = load(values + first);
    n = append(at_least(x, all(t)), lanes_from(first), x, n, columns, scores);
  }
  return n;
}

// Columns and scores of the values that are at least t, in order. A maximum stands for one lane of
// a number of lines, vectors of values. Maxima that reach t are found without branches, 64 vectors
// at a time; among a few vectors most do.
INLINE int64_t collect(const float* maxima, int64_t vectors, int64_t lines, const float* values,
                       float t, int32_t* columns, float* scores) {
  const int64_t size = lines * LANES;
  if (vectors <= 4) return collect_lines(values, 0, vectors * size, t, 0, columns, scores);
  int64_t n = 0;
  for (int64_t start = 0; start < vectors; start += 64) {
    uint64_t hits = 0;
    for (int64_t i = start; i < std::min(start + 64, vectors); ++i) {
      const uint64_t hit = at_least(load(maxima + i * LANES), all(t)) != 0;
      hits |= hit << (i - start);
    }
    for (; hits; hits &= hits - 1) {
      const int64_t begin = (start + __builtin_ctzll(hits)) * size;
      n = collect_lines(values, begin, begin + size, t, n, columns, scores);
    }
  }
  return n;
}

// Of scores that are equal to the smallest kept one, t, leaves those of the first keys.
TARGET int64_t drop_ties(int32_t* columns, float* scores, int64_t n, int64_t k, float t) {
  for (int64_t i = 0; i < n; ++i) k -= scores[i] > t;
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (scores[i] == t && k-- <= 0) continue;
    columns[kept] = columns[i];
    scores[kept++] = scores[i];
  }
  return kept;
}

// Keeps the k largest of n scores and, unless ties are exact, those equal to the smallest of them.
TARGET int64_t keep(int32_t* columns, float* scores, int64_t n, int64_t k, bool exact_ties,
                    float* order) {
  if (n <= k) return n;
  const int64_t vectors = up(n, LANES) / LANES;
  store(scores + n, all(LOWEST));
  float t = bound(scores, vectors, k, 0);
  if (vectors > 1 && count(scores, vectors, t) > k) {  // ties, or too close for bisection
    std::copy(scores, scores + n, order);
    std::nth_element(order, order + k - 1, order + n, std::greater<float>());
    t = order[k - 1];
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float score = scores[i];
    columns[kept] = columns[i];
    scores[kept] = score;
    kept += score >= t;
  }
  return kept > k && exact_ties ? drop_ties(columns, scores, kept, k, t) : kept;
}

TARGET void softmax(float* scores, int64_t n) {
  const int64_t vectors = up(n, LANES) / LANES;
  store(scores + n, all(LOWEST));
  Vec most = all(LOWEST);
  for (int64_t i = 0; i < vectors; ++i) most = larger(most, load(scores + i * LANES));
  const Vec shift = all(maximum(most));
  Vec total = Vec{};
  for (int64_t i = 0; i < vectors; ++i) {
    Vec x = load(scores + i * LANES);
    x = exponential(x - shift);
    store(scores + i * LANES, x);
    total += x;
  }
  const Vec share = 1.0f / all(sum(total));
  for (int64_t i = 0; i < vectors; ++i) store(scores + i * LANES, load(scores + i * LANES) * share);
}

// keep and softmax for scores that fit into a vector: no detour through memory.
INLINE int64_t keep_softmax(int32_t* columns, float* scores, int64_t n, int64_t k) {
  store(scores + n, all(LOWEST));
  const Vec x = load(scores);
  const float t = n > k ? kth(x, k) : LOWEST;
  const Vec shares = exponential(x - all(maximum(x)));
  const Vec kept_shares = x >= t ? shares : Vec{};  // nothing of -inf
  const Ints places = *reinterpret_cast<const LooseInts*>(columns);
  const uint32_t kept = at_least(x, all(t)) & ((1u << n) - 1);
  return append(kept, places, kept_shares * (1.0f / all(sum(kept_shares))), 0, columns, scores);
}

// Adds the weighted rows of a matrix: output = sum of weights[i] * rows[columns[i]].
template <class T>
TARGET void weighted_sum(const T* rows, int64_t stride, const int32_t* columns, const float* weights,
                         int64_t n, int64_t width, float scale, T* output) {
  int64_t d = 0;
  for (; d + 4 * LANES <= width; d += 4 * LANES) {
    Vec total[4] = {};
    for (int64_t i = 0; i < n; ++i) {
      const T* row = rows + columns[i] * stride + d;
      for (int v = 0; v < 4; ++v) total[v] += load(row + v * LANES) * weights[i];
    }
    for (int v = 0; v < 4; ++v) store(output + d + v * LANES, total[v] * scale);
  }
  for (; d + LANES <= width; d += LANES) {
    Vec total = Vec{};
    for (int64_t i = 0; i < n; ++i) total += load(rows + columns[i] * stride + d) * weights[i];
    store(output + d, total * scale);
  }
  for (; d < width; ++d) {
    float total = 0;
    for (int64_t i = 0; i < n; ++i) total += get(rows + columns[i] * stride + d) * weights[i];
    put(output + d, total * scale);
  }
}

// ---------------------------------------------------------------- forward

INLINE float score_scale(const Problem& p) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.width)));
}

// Maxima of a number of vectors in fewer.
TARGET void fold(const float* maxima, int64_t vectors, int64_t fewer, float* folded) {
  for (int64_t i = 0; i < fewer; ++i) {
    Vec most = load(maxima + i * LANES);
    for (int64_t j = i + fewer; j < vectors; j += fewer) {
      most = larger(most, load(maxima + j * LANES));
    }
    store(folded + i * LANES, most);
  }
}

template <class T>
INLINE void prefetch(const T* row, int64_t width) {
  const char* line = reinterpret_cast<const char*>(row);
  for (const char* end = line + width * sizeof(T); line < end; line += 64) {
    __builtin_prefetch(line);
  }
}

// Keys that a row may attend at most, counted from the first.
INLINE int64_t row_limit(const Problem& p, int64_t row, int64_t keys) {
  if (!p.causal) return keys;
  const int64_t limit = row % p.target + p.source - p.target + 1;
  return limit < 0 ? 0 : limit < keys ? limit : keys;
}

// Applies bias, mask and limit to the scores of one row in one panel.
TARGET void restrict_scores(const Problem& p, const Task& task, const bool* mask, int64_t row,
                            int64_t limit, int64_t start, float* scores, float* maxima) {
  const int64_t head = row_head(p, task, row), time = row % p.target;
  const int64_t end = limit < start ? 0 : limit - start < PANEL ? limit - start : PANEL;
  if (p.bias) {
    const int64_t step = p.bias_stride[3];
    const float* bias = at(p.bias, p.bias_stride, task.batch, head, time) + start * step;
    if (step == 1) {
      for (int64_t j = 0; j < end; ++j) scores[j] += bias[j];
    } else {
      for (int64_t j = 0; j < end; ++j) scores[j] += bias[j * step];
    }
  }
  if (mask) {
    const int64_t step = p.mask_stride[3];
    const bool* may = at(mask, p.mask_stride, task.batch, head, time) + start * step;
    if (step == 1) {
      for (int64_t j = 0; j < end; ++j) scores[j] = may[j] ? scores[j] : LOWEST;
    } else {
      for (int64_t j = 0; j < end; ++j) scores[j] = may[j * step] ? scores[j] : LOWEST;
    }
  }
  for (int64_t j = end; j < PANEL; ++j) scores[j] = LOWEST;
  Vec most = load(scores);
  for (int v = 1; v < VECTORS; ++v) most = larger(most, load(scores + v * LANES));
  store(maxima, most);
}

// Leaves masked keys at the end alone: gives the number of keys before them, and drops a mask that
// says nothing else. Only for a mask that is the same for all rows of the task.
TARGET int64_t trim(const Problem& p, const Task& task, const bool** mask) {
  int64_t keys = p.source;
  const bool same = p.mask && p.mask_stride[2] == 0 &&
                    (p.mask_stride[1] == 0 || p.num_heads == p.num_kv_heads);
  if (!same) return keys;
  const bool* may = at(p.mask, p.mask_stride, task.batch, row_head(p, task, 0), 0);
  while (keys && !may[(keys - 1) * p.mask_stride[3]]) --keys;
  bool whole = true;
  for (int64_t j = 0; j < keys; ++j) whole &= may[j * p.mask_stride[3]];
  if (whole) *mask = nullptr;
  return keys;
}

template <class T>
TARGET void forward_task(const Problem& p, const Task& task, Kept& kept) {
  using Step = typename StepOf<T>::type;
  const bool* mask = p.mask;
  const int64_t keys = trim(p, task, &mask);
  const int64_t rows = task.last - task.first, units = (p.width + Step::WIDTH - 1) / Step::WIDTH;
  const int64_t panels = up(keys, PANEL) / PANEL;
  const int64_t stride = panels * PANEL + LANES;  // not a power of two: rows in other cache sets
  int64_t block = block_scores() / stride / ROWS * ROWS;
  block = std::min(std::max<int64_t>(block, ROWS), up(rows, ROWS));
  // At least 2 k maxima give a good lower bound; where there are fewer, the scores themselves do.
  const int64_t wanted = up(2 * p.most_keys, LANES) / LANES;
  const bool direct = wanted > panels;
  const bool again = rows > block;  // packed keys serve more than one block

  Buffer<float> packed((again ? panels : 1) * PANEL * units), query(block * units);
  Buffer<float> scores(block * stride), maxima(block * panels * LANES), folded(wanted * LANES);
  const int64_t room = panels * PANEL + 2 * LANES;
  Buffer<float> weights(room), order(room);
  Buffer<int32_t> columns(room);
  const float scale = score_scale(p);
  const T* key = at(static_cast<const T*>(p.key), p.key_stride, task.batch, task.kv_head, 0);
  const T* value = at(static_cast<const T*>(p.value), p.value_stride, task.batch, task.kv_head, 0);
  kept.expect(rows, rows * std::min(p.most_keys, keys));
  int64_t ready = 0;  // panels packed

  for (int64_t first = task.first; first < task.last; first += block) {
    const int64_t last = std::min(first + block, task.last), n = last - first;
    int64_t end = 0, whole = keys;  // keys that some row may attend, and that all may
    for (int64_t row = first; row < last; ++row) {
      const int64_t limit = row_limit(p, row, keys);
      end = std::max(end, limit);
      whole = std::min(whole, limit);
      const int64_t head = row_head(p, task, row);
      const T* from = at(static_cast<const T*>(p.query), p.query_stride, task.batch, head,
                         row % p.target);
      float* to = query.get() + (row - first) * units;
      int64_t u = 0;
      for (; (u + LANES) * Step::WIDTH <= p.width; u += LANES) {
        store(to + u, Step::units(from + u * Step::WIDTH));
      }
      for (; u < units; ++u) {
        to[u] = Step::unit(from + u * Step::WIDTH, p.width - u * Step::WIDTH);
      }
    }
    const int64_t tiled = up(n, ROWS);
    std::fill(query.get() + n * units, query.get() + tiled * units, 0.0f);

    for (int64_t panel = 0; panel * PANEL < end; ++panel) {
      const int64_t start = panel * PANEL, width = std::min(keys - start, PANEL);
      float* keys_of = packed.get() + (again ? start * units : 0);
      if (!again || panel == ready) {
        pack(key + start * p.key_stride[2], p.key_stride[2], width, p.width, keys_of);
        for (int64_t j = start; j < start + width; ++j) {  // soon read in no order
          prefetch(value + j * p.value_stride[2], p.value_width);
        }
        ready = panel + 1;
      }
      const int64_t vectors = up(width, LANES) / LANES;
      const auto run = n == 1 ? tile_of<Step, 1> : tile_of<Step, ROWS>;
      for (int64_t row = 0; row < n; row += ROWS) {
        run(vectors, query.get() + row * units, units, keys_of, scale,
            scores.get() + row * stride + start, stride,
            maxima.get() + (row * panels + panel) * LANES, panels * LANES);
      }
      const bool restricted = p.bias || mask || start + vectors * LANES > whole;
      for (int64_t row = 0; restricted && row < n; ++row) {
        restrict_scores(p, task, mask, first + row, row_limit(p, first + row, keys), start,
                        scores.get() + row * stride + start,
                        maxima.get() + (row * panels + panel) * LANES);
      }
    }

    for (int64_t row = first; row < last; ++row) {
      const int64_t head = row_head(p, task, row), time = row % p.target;
      const int64_t k = *at(p.top_k, p.top_k_stride, task.batch, head, time);
      const int64_t limit = row_limit(p, row, keys);
      const float* values = scores.get() + (row - first) * stride;
      int64_t found;
      if (direct) {
        const int64_t vectors = up(limit, LANES) / LANES;
        const float t = bound(values, vectors, k, 0);
        found = collect(values, vectors, 1, values, t, columns.get(), weights.get());
      } else {
        const float* most = maxima.get() + (row - first) * panels * LANES;
        const int64_t vectors = up(limit, PANEL) / PANEL;
        if (vectors > wanted) fold(most, vectors, wanted, folded.get());
        const float* bounds = vectors > wanted ? folded.get() : most;
        const float t = bound(bounds, std::min(vectors, wanted), k, k / 8);
        const int64_t lines = vectors > 1 ? VECTORS : up(limit, LANES) / LANES;
        found = collect(most, vectors, lines, values, t, columns.get(), weights.get());
      }
      for (int64_t i = 0; i < std::min<int64_t>(found, 2 * LANES); ++i) {
        prefetch(value + columns.get()[i] * p.value_stride[2], p.value_width);
      }
      if (found <= LANES && !p.exact_ties) {
        found = keep_softmax(columns.get(), weights.get(), found, k);
      } else {
        found = keep(columns.get(), weights.get(), found, k, p.exact_ties, order.get());
        softmax(weights.get(), found);
      }
      kept.add(columns.get(), weights.get(), found);
      if (p.dropout > 0) {
        const int64_t number = row_number(p, task, row);
        for (int64_t i = 0; i < found; ++i) {
          weights.get()[i] *= dropout_factor(p, number, columns.get()[i]);
        }
      }
      T* output = at(static_cast<T*>(p.output), p.output_stride, task.batch, head, time);
      weighted_sum(value, p.value_stride[2], columns.get(), weights.get(), found, p.value_width,
                   1.0f, output);
    }
  }
}

// ---------------------------------------------------------------- backward

template <class T>
INLINE float dot(const T* a, const T* b, int64_t width) {
  Vec total[2] = {};
  int64_t d = 0;
  for (; d + 2 * LANES <= width; d += 2 * LANES) {
    total[0] += load(a + d) * load(b + d);
    total[1] += load(a + d + LANES) * load(b + d + LANES);
  }
  for (; d + LANES <= width; d += LANES) total[0] += load(a + d) * load(b + d);
  float found = sum(total[0] + total[1]);
  for (; d < width; ++d) found += get(a + d) * get(b + d);
  return found;
}

template <class T>
INLINE void add_scaled(float* total, const T* x, float factor, int64_t width) {
  int64_t d = 0;
  for (; d + LANES <= width; d += LANES) store(total + d, load(total + d) + load(x + d) * factor);
  for (; d < width; ++d) total[d] += get(x + d) * factor;
}

template <class T>
TARGET void write_scaled(T* to, const float* from, float factor, int64_t width) {
  int64_t d = 0;
  for (; d + LANES <= width; d += LANES) store(to + d, load(from + d) * factor);
  for (; d < width; ++d) put(to + d, from[d] * factor);
}

// One row of the backward.
template <class T>
struct Row {
  int64_t number, entries;
  const int32_t* columns;
  const float* weights;
  float* scores;
  const T *query, *output;

  TARGET Row(const Problem& p, const Gradients& g, const Task& task, int64_t row) {
    const int64_t head = row_head(p, task, row), time = row % p.target;
    number = row_number(p, task, row);
    const int64_t start = g.offsets[number];
    entries = g.offsets[number + 1] - start;
    columns = g.columns + start;
    weights = g.weights + start;
    scores = g.scores + start;
    query = at(static_cast<const T*>(p.query), p.query_stride, task.batch, head, time);
    output = at(static_cast<const T*>(g.output), g.output_stride, task.batch, head, time);
  }
};

// Sums of the gradients of some keys and values of a head: dk = dP^T q / sqrt(D), dv = A^T dC.
// Rows are added in their order, so the sums do not depend on the number of threads.
template <class T>
class Sums {
 public:
  TARGET Sums(const Problem& p, int64_t begin, int64_t end)
      : begin_(begin), end_(end), keys_((end - begin) * p.width),
        values_((end - begin) * p.value_width) {
    std::fill_n(keys_.get(), (end - begin) * p.width, 0.0f);
    std::fill_n(values_.get(), (end - begin) * p.value_width, 0.0f);
  }

  INLINE void expect(const Problem& p, int64_t column) const {
    prefetch(keys_.get() + (column - begin_) * p.width, p.width);
    prefetch(values_.get() + (column - begin_) * p.value_width, p.value_width);
  }

  TARGET void add(const Problem& p, const Row<T>& row) {
    for (int64_t i = 0; i < row.entries; ++i) {
      const int64_t column = row.columns[i];
      if (column < begin_ || column >= end_) continue;
      float weight = row.weights[i];
      if (p.dropout > 0) weight *= dropout_factor(p, row.number, column);
      add_scaled(keys_.get() + (column - begin_) * p.width, row.query, row.scores[i], p.width);
      add_scaled(values_.get() + (column - begin_) * p.value_width, row.output, weight,
                 p.value_width);
    }
  }

  TARGET void write(const Problem& p, const Gradients& g, const Task& task) {
    for (int64_t j = begin_; j < end_; ++j) {
      T* key = at(static_cast<T*>(g.key), g.key_stride, task.batch, task.kv_head, j);
      T* value = at(static_cast<T*>(g.value), g.value_stride, task.batch, task.kv_head, j);
      write_scaled(key, keys_.get() + (j - begin_) * p.width, score_scale(p), p.width);
      write_scaled(value, values_.get() + (j - begin_) * p.value_width, 1.0f, p.value_width);
    }
  }

 private:
  int64_t begin_, end_;
  Buffer<float> keys_, values_;
};

// Gradients of the kept scores and of the query of a row:
// dA = dC v^T, dP = A (dA - sum of A dA), dq = dP k / sqrt(D).
template <class T>
TARGET void backward_row(const Problem& p, const Gradients& g, const Task& task, int64_t at_row,
                         const Row<T>& row, const T* key, const T* value) {
  float mean = 0;
  for (int64_t i = 0; i < row.entries; ++i) {
    const int64_t column = row.columns[i];
    float weight = dot(row.output, value + column * p.value_stride[2], p.value_width);
    if (p.dropout > 0) weight *= dropout_factor(p, row.number, column);
    row.scores[i] = weight;
    mean += row.weights[i] * weight;
  }
  for (int64_t i = 0; i < row.entries; ++i) {
    row.scores[i] = row.weights[i] * (row.scores[i] - mean);
  }
  T* query = at(static_cast<T*>(g.query), g.query_stride, task.batch, row_head(p, task, at_row),
                at_row % p.target);
  weighted_sum(key, p.key_stride[2], row.columns, row.scores, row.entries, p.width, score_scale(p),
               query);
}

// Gradients of the rows of a task, and of all keys too if the task holds all rows of the head.
template <class T>
TARGET void backward_rows(const Problem& p, const Gradients& g, const Task& task, bool with_keys) {
  const T* key = at(static_cast<const T*>(p.key), p.key_stride, task.batch, task.kv_head, 0);
  const T* value = at(static_cast<const T*>(p.value), p.value_stride, task.batch, task.kv_head, 0);
  Sums<T> sums(p, 0, with_keys ? p.source : 0);
  for (int64_t i = task.first; i < task.last; ++i) {
    const Row<T> row(p, g, task, i);
    if (i + 1 < task.last) {  // the rows of the next one's keys are read in no order
      const Row<T> next(p, g, task, i + 1);
      for (int64_t j = 0; j < std::min<int64_t>(next.entries, 16); ++j) {
        prefetch(key + next.columns[j] * p.key_stride[2], p.width);
        prefetch(value + next.columns[j] * p.value_stride[2], p.value_width);
        if (with_keys) sums.expect(p, next.columns[j]);
      }
    }
    backward_row(p, g, task, i, row, key, value);
    if (with_keys) sums.add(p, row);
  }
  sums.write(p, g, task);
}

// Gradients of the keys and values from begin to end - 1, from the rows of the task.
template <class T>
TARGET void backward_keys(const Problem& p, const Gradients& g, const Task& task, int64_t begin,
                          int64_t end) {
  Sums<T> sums(p, begin, end);
  for (int64_t i = task.first; i < task.last; ++i) sums.add(p, Row<T>(p, g, task, i));
  sums.write(p, g, task);
}

constexpr Level LEVEL = {
    {forward_task<float>, forward_task<Bf16>},
    {backward_rows<float>, backward_rows<Bf16>},
    {backward_keys<float>, backward_keys<Bf16>},
};

#undef INLINE
}  // namespace ISA
