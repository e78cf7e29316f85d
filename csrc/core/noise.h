// Noise that samples entries, one copy for all compiled backends; sparse_optim/backends/noise.py is
// the specification.
//
//   E = -log(1 - v),  v = (u + f) / 2^32,  u = Philox-4x32-10 word of (seed, step, tensor,
//   position)
//
// Correctly rounded +, *, / alone: compile without contraction to fused multiply-add.
#pragma once
#include <cmath>

#include "core/types.h"

namespace sparse_optim {

// What the noise of a step is a function of, besides the entry.
struct Noise {
  bool on;
  uint64_t seed;
  uint32_t step;
};

struct Words {
  uint32_t word[4];
};

// The words of entries 4 group to 4 group + 3 of a pool tensor.
SPARSE_OPTIM_INLINE Words philox(const Noise& noise, uint32_t group, uint32_t tensor,
                                 uint32_t draw) {
  uint32_t c0 = group, c1 = tensor, c2 = noise.step, c3 = draw;
  uint32_t k0 = uint32_t(noise.seed), k1 = uint32_t(noise.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * c0, product1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(product1);
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

constexpr uint32_t kRefinedBelow = 1u << 16;

// f of a second draw; without one, f is 0.5.
SPARSE_OPTIM_INLINE float refinement(uint32_t second) {
  return (float(second) + 0.5f) * 0x1p-32f;
}

SPARSE_OPTIM_INLINE float exponential(uint32_t word, float fraction) {
  const bool small = word < 0x80000000u;
  const uint32_t nearest = small ? word : 0xffffffffu - word;
  const float value = (float(nearest) + fraction) * 0x1p-32f;
  const int32_t bits = to_bits(value);
  const float halvings = float(small ? 0 : 126 - (bits >> 23));
  const float mantissa = from_bits((bits & 0x7fffff) | (126 << 23));
  const float distance = small ? value : 1.f - mantissa;
  const float s = distance / (2.f - distance);
  const float square = s * s;
  float series = 1.f / 15;
  series = series * square + 1.f / 13;
  series = series * square + 1.f / 11;
  series = series * square + 1.f / 9;
  series = series * square + 1.f / 7;
  series = series * square + 1.f / 5;
  series = series * square + 1.f / 3;
  const float tail = s * (series * square);
  return halvings * 0x1.62e43p-1f + 2.f * (s + tail);
}

// score / sqrt(E)
SPARSE_OPTIM_INLINE float perturbed(float score, uint32_t word, float fraction) {
  return score / sqrtf(exponential(word, fraction));
}

}  // namespace sparse_optim
