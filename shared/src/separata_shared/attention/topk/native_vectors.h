// Vectors of one instruction set, for native_kernel.h, which says what is defined.

namespace ISA {

#define INLINE TARGET inline __attribute__((always_inline))

constexpr int64_t PANEL = LANES * VECTORS;  // keys in a panel of packed keys
constexpr float LOWEST = -__builtin_inff();

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef float LooseVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
INLINE void store(float* p, Vec x) { *reinterpret_cast<LooseVec*>(p) = x; }
INLINE Vec all(float x) { return x - Vec{}; }
INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

INLINE Vec load(const Bf16* p) {
  const Halves x = *reinterpret_cast<const LooseHalves*>(p);
  return reinterpret_cast<Vec>(__builtin_convertvector(x, Bits) << 16);
}

INLINE void store(Bf16* p, Vec x) {
  const Bits bits = reinterpret_cast<Bits>(x);
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  rounded = reinterpret_cast<Bits>(x == x) ? rounded : Bits{} + 0x7fc0;
  *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector(rounded, Halves);
}

INLINE float get(const float* p) { return *p; }
INLINE float get(const Bf16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(Bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// Bit i says whether lane i is at least t.
INLINE uint32_t at_least(Vec x, Vec t) {
#if LANES == 16
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(t), _CMP_GE_OQ);
#elif LANES == 8
  return _mm256_movemask_ps(
      _mm256_cmp_ps(reinterpret_cast<__m256>(x), reinterpret_cast<__m256>(t), _CMP_GE_OQ));
#else
  uint32_t mask = 0;
  const Ints found = x >= t;
  for (int i = 0; i < LANES; ++i) mask |= static_cast<uint32_t>(found[i] & 1) << i;
  return mask;
#endif
}

INLINE float sum(Vec x) {
#if LANES == 16
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
#endif
}

INLINE float maximum(Vec x) {
#if LANES == 16
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(x));
#else
  float most = x[0];
  for (int i = 1; i < LANES; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

// e^x for x <= 0: 2^n e^r with |r| <= ln(2) / 2 and eight terms of the series. Results below the
// normal numbers, which are slow to compute, are 0.
INLINE Vec exponential(Vec x) {
  const Vec bounded = larger(all(-87.0f), x);
  const Ints n = __builtin_convertvector(bounded * 1.44269504f - 0.5f, Ints);
  const Vec whole = __builtin_convertvector(n, Vec);
  const Vec r = (bounded - whole * 0.693145752f) - whole * 1.42860677e-6f;
  Vec y = all(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return x < -87.0f ? Vec{} : y * reinterpret_cast<Vec>((n + 127) << 23);
}

}  // namespace ISA
