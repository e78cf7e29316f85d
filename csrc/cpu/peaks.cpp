#include "cpu/peaks.h"

#if defined(SPARSE_OPTIM_CLONES)
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms of GCC 12 in its own header
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#define SPARSE_OPTIM_AVX512 __attribute__((target("avx512f,avx512bw,fma")))
#endif

namespace sparse_optim::cpu {
namespace {

// How far ahead of the arithmetic to fetch, in the loops that the compiler vectorizes. The
// hardware's own prefetching restarts at each 4 KB page: with 8 KB, two cores read 38.4 instead
// of 34.9 GB/s in float32 and 41.6 instead of 30.0 in bfloat16 (a bare read: 41 and 44); 1, 2 and 4
// KB were slower, 6, 12, 16 and 32 KB no faster over both. Measured with AVX-512 loops written by
// hand, before those below.
constexpr int64_t kPrefetchBytes = 8192;

struct Peak {
  int32_t bits;
  float squares;
};

// Two chains of maxima and sums, since one alone would wait for its own additions.
template <class T>
SPARSE_OPTIM_INLINE Peak peak_of(const T* grad, int64_t count) {
  const int64_t half = count / 2;
  int32_t bits = 0, more_bits = 0;
  float squares = 0.f, more_squares = 0.f;
#pragma omp simd reduction(max : bits, more_bits) reduction(+ : squares, more_squares)
  for (int64_t i = 0; i < half; ++i) {
    const float value = to_float(grad[i]), more = to_float(grad[half + i]);
    const int32_t magnitude = magnitude_bits(value), more_magnitude = magnitude_bits(more);
    bits = magnitude > bits ? magnitude : bits;
    more_bits = more_magnitude > more_bits ? more_magnitude : more_bits;
    squares += value * value;
    more_squares += more * more;
  }
  const float last = count % 2 ? to_float(grad[count - 1]) : 0.f;
  return {std::max(std::max(bits, more_bits), magnitude_bits(last)),
          squares + more_squares + last * last};
}

// bfloat16 in pairs: the upper half of a word is a float32 as it stands, the lower one after a
// shift. From a cache one core takes 46 GB/s so, widening one by one 30.
SPARSE_OPTIM_INLINE Peak peak_of(const BFloat16* grad, int64_t count) {
  typedef int32_t Pair __attribute__((aligned(2), may_alias));
  const Pair* pairs = reinterpret_cast<const Pair*>(grad);
  int32_t even_bits = 0, odd_bits = 0;
  float even_squares = 0.f, odd_squares = 0.f;
#pragma omp simd reduction(max : even_bits, odd_bits) reduction(+ : even_squares, odd_squares)
  for (int64_t i = 0; i < count / 2; ++i) {
    const int32_t even = int32_t(uint32_t(pairs[i]) << 16) & 0x7fffffff;
    const int32_t odd = pairs[i] & 0x7fff0000;
    even_bits = even > even_bits ? even : even_bits;
    odd_bits = odd > odd_bits ? odd : odd_bits;
    even_squares += from_bits(even) * from_bits(even);
    odd_squares += from_bits(odd) * from_bits(odd);
  }
  const float last = count % 2 ? to_float(grad[count - 1]) : 0.f;
  return {std::max(std::max(even_bits, odd_bits), magnitude_bits(last)),
          even_squares + odd_squares + last * last};
}

template <class T>
SPARSE_OPTIM_INLINE int32_t peak_of_kept(const T* grad, const int32_t* keep, int64_t count) {
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = magnitude_bits(to_float(grad[i])) & keep[i];
    most = bits > most ? bits : most;
  }
  return most;
}

template <class T>
SPARSE_OPTIM_INLINE void prefetch(const T* grad, int64_t count) {
  const char* ahead = reinterpret_cast<const char*>(grad) + kPrefetchBytes;
  for (size_t line = 0; line < count * sizeof(T); line += 64) __builtin_prefetch(ahead + line);
}

template <class T, class PeakOf>
SPARSE_OPTIM_INLINE Peaks peaks_of(const T* grad, int64_t count, int64_t tile, int32_t* tile_max,
                                   PeakOf peak_of_tile) {
  Peaks all;
  for (int64_t first = 0; first < count; first += tile) {
    const int64_t size = tile < count - first ? tile : count - first;
    prefetch(grad + first, size);
    const Peak peak = peak_of_tile(grad + first, size);
    all.squares += double(peak.squares);
    all.bits = all.bits > peak.bits ? all.bits : peak.bits;
    *tile_max++ = peak.bits;
  }
  return all;
}

#define SPARSE_OPTIM_PEAKS(T)                                                                \
  SPARSE_OPTIM_VECTORIZED Peaks vectorized_peaks(const T* grad, int64_t count, int64_t tile, \
                                                 int32_t* tile_max) {                        \
    return peaks_of(grad, count, tile, tile_max,                                             \
                    [](const T* first, int64_t size)                                         \
                        __attribute__((always_inline)) { return peak_of(first, size); });    \
  }
SPARSE_OPTIM_PEAKS(float)
SPARSE_OPTIM_PEAKS(BFloat16)
SPARSE_OPTIM_PEAKS(Float16)
#undef SPARSE_OPTIM_PEAKS

#if defined(SPARSE_OPTIM_CLONES)
// By hand, since the compiler sums up four vectors by way of memory, and takes 10 operations for 64
// bytes of bfloat16: from a cache one core takes 83 GB/s of that so (AVX-512), and 46 by the loop
// above.
struct FloatsPeak {
  static constexpr int64_t kStep = 32;
  __m512i bits, more_bits;
  __m512 squares, more_squares;

  SPARSE_OPTIM_AVX512 void add(__m512 grad, __m512 more) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    bits = _mm512_max_epi32(bits, _mm512_and_si512(_mm512_castps_si512(grad), magnitude));
    more_bits = _mm512_max_epi32(more_bits, _mm512_and_si512(_mm512_castps_si512(more), magnitude));
    squares = _mm512_fmadd_ps(grad, grad, squares);
    more_squares = _mm512_fmadd_ps(more, more, more_squares);
  }

  SPARSE_OPTIM_AVX512 void add(const float* grad) {
    add(_mm512_loadu_ps(grad), _mm512_loadu_ps(grad + 16));
  }

  SPARSE_OPTIM_AVX512 void add(const float* grad, int64_t count) {
    const uint32_t lanes = (uint32_t(1) << count) - 1;
    add(_mm512_maskz_loadu_ps(__mmask16(lanes), grad),
        _mm512_maskz_loadu_ps(__mmask16(lanes >> 16), grad + 16));
  }

  SPARSE_OPTIM_AVX512 Peak reduced() const {
    return {_mm512_reduce_max_epi32(_mm512_max_epi32(bits, more_bits)),
            _mm512_reduce_add_ps(_mm512_add_ps(squares, more_squares))};
  }
};

// Magnitudes are compared as 16-bit integers, even and odd ones at once.
struct PairsPeak {
  static constexpr int64_t kStep = 32;
  __m512i bits;  // two 16-bit magnitudes in a word
  __m512 even_squares, odd_squares;

  SPARSE_OPTIM_AVX512 void add(__m512i pairs) {
    const __m512i upper = _mm512_set1_epi32(-0x10000);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
    bits = _mm512_max_epi16(bits, _mm512_and_si512(pairs, _mm512_set1_epi16(0x7fff)));
    even_squares = _mm512_fmadd_ps(even, even, even_squares);
    odd_squares = _mm512_fmadd_ps(odd, odd, odd_squares);
  }

  SPARSE_OPTIM_AVX512 void add(const BFloat16* grad) { add(_mm512_loadu_si512(grad)); }

  SPARSE_OPTIM_AVX512 void add(const BFloat16* grad, int64_t count) {
    add(_mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, grad));
  }

  SPARSE_OPTIM_AVX512 Peak reduced() const {
    const __m512i odd = _mm512_and_si512(bits, _mm512_set1_epi32(-0x10000));
    return {_mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_slli_epi32(bits, 16), odd)),
            _mm512_reduce_add_ps(_mm512_add_ps(even_squares, odd_squares))};
  }
};

// Stretches of a task that are read in turn, a tile of each: the hardware fetches ahead in each of
// them, and fetching ahead by instruction (below) only slows that down. The scan of 110M entries,
// 160K of them active, two cores, medians in ms, float32 | bfloat16:
//   1 with kPrefetchBytes  19.7 | 12.2        3  15.7 | 8.9
//   1                      19.0 |  9.7        4  16.1 | 8.8
//   2                      15.3 |  9.8        8  18.9 | 9.9
constexpr int64_t kStreams = 3;

template <class Accumulator, class T>
SPARSE_OPTIM_AVX512 Peaks peaks_avx512(const T* grad, int64_t count, int64_t tile,
                                       int32_t* tile_max) {
  const int64_t tiles = tiles_of(count, tile), stride = tiles / kStreams;
  Peaks all;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t index = i < kStreams * stride ? i % kStreams * stride + i / kStreams : i;
    const int64_t first = index * tile, end = std::min(count, first + tile);
    Accumulator accumulator{};
    int64_t at = first;
    for (; at + Accumulator::kStep <= end; at += Accumulator::kStep) accumulator.add(grad + at);
    if (at < end) accumulator.add(grad + at, end - at);
    const Peak peak = accumulator.reduced();
    all.squares += double(peak.squares);
    all.bits = std::max(all.bits, peak.bits);
    tile_max[index] = peak.bits;
  }
  return all;
}

bool has_avx512() {
  static const bool supported = __builtin_cpu_supports("avx512bw");
  return supported;
}
#endif

}  // namespace

Peaks peaks(const float* grad, int64_t count, int64_t tile, int32_t* tile_max) {
#if defined(SPARSE_OPTIM_CLONES)
  if (has_avx512()) return peaks_avx512<FloatsPeak>(grad, count, tile, tile_max);
#endif
  return vectorized_peaks(grad, count, tile, tile_max);
}

Peaks peaks(const BFloat16* grad, int64_t count, int64_t tile, int32_t* tile_max) {
#if defined(SPARSE_OPTIM_CLONES)
  if (has_avx512()) return peaks_avx512<PairsPeak>(grad, count, tile, tile_max);
#endif
  return vectorized_peaks(grad, count, tile, tile_max);
}

Peaks peaks(const Float16* grad, int64_t count, int64_t tile, int32_t* tile_max) {
  return vectorized_peaks(grad, count, tile, tile_max);
}

#define SPARSE_OPTIM_KEPT(T)                                                                     \
  SPARSE_OPTIM_VECTORIZED int32_t kept_peak(const T* grad, const int32_t* keep, int64_t count) { \
    return peak_of_kept(grad, keep, count);                                                      \
  }
SPARSE_OPTIM_KEPT(float)
SPARSE_OPTIM_KEPT(BFloat16)
SPARSE_OPTIM_KEPT(Float16)
#undef SPARSE_OPTIM_KEPT

}  // namespace sparse_optim::cpu
