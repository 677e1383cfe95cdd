// Rows of a norm for one instruction set. native.cpp includes this file once for each, with
//   ISA      the name of the namespace
//   TARGET   the attribute that allows the instructions
//   LANES    floats in a vector

namespace ISA {

#define INLINE TARGET inline __attribute__((always_inline))
#define EACH (auto lane, int64_t i, int part) TARGET __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// Numbers between what is computed and what is asked for from memory: 8 KiB.
template <class T>
constexpr int64_t AHEAD = 8192 / sizeof(T);

// A pass over a row: body gets a vector or, for what remains, a number; where it begins; and which
// of four sums it may add to without waiting for the last addition.
template <class Body>
INLINE void each(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    for (int part = 0; part < 4; ++part) body(Vec{}, i + part * LANES, part);
  }
  for (; i + LANES <= width; i += LANES) body(Vec{}, i, 0);
  for (; i < width; ++i) body(0.0f, i, 0);
}

struct Sum {
  Vec parts[4] = {};
  float rest = 0;

  INLINE void add(Vec x, int part) { parts[part] += x; }
  INLINE void add(float x, int) { rest += x; }
  INLINE float total() const {
    const Vec sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    float all = rest;
    for (int i = 0; i < LANES; ++i) all += sum[i];
    return all;
  }
};

template <class V>
INLINE V load(const float* p) {
  V x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

INLINE Vec widened(Vec x) { return x; }
INLINE float widened(float x) { return x; }
INLINE Vec widened(Halves x) {
  return reinterpret_cast<Vec>(__builtin_convertvector(x, Bits) << 16);
}
INLINE float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

template <class V>
INLINE V load(const Bf16* p) {
  std::conditional_t<std::is_same_v<V, float>, uint16_t, Halves> x;
  std::memcpy(&x, p, sizeof(x));
  return widened(x);
}

// As stored: bfloat16 rounds to nearest, ties to even.
INLINE Vec narrowed(const float*, Vec x) { return x; }
INLINE float narrowed(const float*, float x) { return x; }
INLINE Halves narrowed(const Bf16*, Vec x) {
  const Bits bits = reinterpret_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto number = reinterpret_cast<Bits>(x == x);
  return __builtin_convertvector((rounded & number) | (0x7fc0 & ~number), Halves);
}
INLINE uint16_t narrowed(const Bf16*, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// STREAM writes past the caches: memory need not be read first, and the inputs stay cached.
template <bool STREAM, class T, class V>
INLINE void store(T* p, V value) {
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

// Mean and standard deviation of a row. Differences to its first entry make equal entries deviate
// by exactly nothing; the second pass corrects a mean that was rounded. It leaves memory idle, so
// rows to come are asked for on the way.
template <bool RESIDUAL, class T>
INLINE Statistics statistics(const float* row, float differences, const Problem& p, const T* x,
                             const T* residual) {
  const float n = p.width, denominator = p.official ? n - 1 : n;
  float mean = row[0] + differences / n;
  Sum sum, squares;
  each(p.width, [&] EACH {
    const auto d = load<decltype(lane)>(row + i) - mean;
    sum.add(d, part);
    squares.add(d * d, part);
    constexpr int64_t ahead = RESIDUAL ? AHEAD<T> / 4 : AHEAD<T>;  // four streams share the cache
    __builtin_prefetch(x + i + ahead);
    if constexpr (RESIDUAL) __builtin_prefetch(residual + i + ahead);
  });
  const float error = sum.total();
  const float variance = (squares.total() - error * error / n) / denominator;
  if (!(variance < LARGEST) || (variance < SMALLEST && p.eps < SMALL_EPS)) {
    return wide_statistics(row, p.width, denominator);
  }
  return {mean + error / n, variance > 0 ? std::sqrt(variance) : 0};
}

// Rows first to last - 1; scratch holds one row of floats.
template <class T, bool RESIDUAL, bool STREAM>
TARGET void forward(const Problem& p, int64_t first, int64_t last, float* scratch) {
  const float C = p.C, slope = p.C * p.k;
  for (int64_t r = first; r < last; ++r) {
    const T* const x = static_cast<const T*>(p.x) + r * p.width;
    const T* const residual = static_cast<const T*>(p.residual) + r * p.width;
    const float* row;
    Sum sum;
    if constexpr (std::is_same_v<T, float> && !RESIDUAL) {
      row = x;
      each(p.width, [&] EACH { sum.add(load<decltype(lane)>(x + i) - x[0], part); });
    } else {
      row = scratch;
      float start = load<float>(x);
      if constexpr (RESIDUAL) start = widened(narrowed(x, start + load<float>(residual)));
      T* const total = static_cast<T*>(p.total) + r * p.width;
      each(p.width, [&] EACH {
        auto v = load<decltype(lane)>(x + i);
        if constexpr (RESIDUAL) {
          const auto stored = narrowed(x, v + load<decltype(lane)>(residual + i));
          store<STREAM>(total + i, stored);
          v = widened(stored);
        }
        store<false>(scratch + i, v);
        sum.add(v - start, part);
      });
    }
    const Statistics found = statistics<RESIDUAL>(row, sum.total(), p, x, residual);
    p.mean[r] = found.mean;
    p.sigma[r] = found.sigma;
    const float scale = 1 / spread(p, found.sigma);
    T* const output = static_cast<T*>(p.output) + r * p.width;
    each(p.width, [&] EACH {
      const auto y = (load<decltype(lane)>(row + i) - found.mean) * scale;
      store<STREAM>(output + i, narrowed(x, y * (C - slope * y)));
    });
  }
}

// With h = g (C - C k y): dx = (h - mean(h) - y sum(h y) s / ((H - 1) sigma)) / s, in the torch
// convention sum(h y) / H; what is detached is left out. The gradient of the sum is added.
template <class T, bool RESIDUAL, bool STREAM>
TARGET void backward(const Problem& p, int64_t first, int64_t last, float*) {
  const float C = p.C, slope = p.C * p.k, n = p.width;
  for (int64_t r = first; r < last; ++r) {
    const T* const x = static_cast<const T*>(p.x) + r * p.width;
    const T* const g = static_cast<const T*>(p.grad) + r * p.width;
    const T* const other = static_cast<const T*>(p.grad_total) + r * p.width;
    const float mean = p.mean[r], sigma = p.sigma[r];
    const float s = spread(p, sigma), scale = 1 / s;
    // Nothing is left of a single entry; a fused multiply-add would leave its rounding.
    const float outer = p.width == 1 && !p.detach_mean ? 0 : scale;
    Sum sum, products;
    each(p.width, [&] EACH {
      using V = decltype(lane);
      const V y = (load<V>(x + i) - mean) * scale;
      const V h = load<V>(g + i) * (C - slope * y);
      sum.add(h, part);
      products.add(h * y, part);
    });
    const float centre = p.detach_mean ? 0 : sum.total() / n;
    float shrink = 0;
    if (!p.detach_std && p.official) {
      shrink = sigma > 0 ? products.total() / sigma * (s / (n - 1)) : 0;
    } else if (!p.detach_std) {
      shrink = products.total() / n;
    }
    T* const output = static_cast<T*>(p.output) + r * p.width;
    each(p.width, [&] EACH {
      using V = decltype(lane);
      const V y = (load<V>(x + i) - mean) * scale;
      const V h = load<V>(g + i) * (C - slope * y);
      V dx = (h - centre - y * shrink) * outer;
      if constexpr (RESIDUAL) dx += load<V>(other + i);
      store<STREAM>(output + i, narrowed(x, dx));
      __builtin_prefetch(x + i + AHEAD<T>);
      __builtin_prefetch(g + i + AHEAD<T>);
    });
  }
}

#define VARIANTS(NAME, T) \
  {{NAME<T, false, false>, NAME<T, false, true>}, {NAME<T, true, false>, NAME<T, true, true>}}
const Level LEVEL = {
    {VARIANTS(forward, float), VARIANTS(forward, Bf16)},
    {VARIANTS(backward, float), VARIANTS(backward, Bf16)},
};
#undef VARIANTS
#undef EACH
#undef INLINE

}  // namespace ISA
