// Philox runs in lanes, one group of four entries each; the second draws, for one entry in 65536,
// one at a time after it.
#include "cpu/noise.h"

#include "cpu/support.h"

namespace sparse_optim::cpu {
namespace {

constexpr int64_t kGroups = kMaxTile / 4 + 2;

// words[4 i + j] = word j of group first + i
SPARSE_OPTIM_VECTORIZED void draw(const Noise& noise, uint32_t tensor, uint32_t first,
                                  int64_t groups, uint32_t* words) {
  uint32_t columns[4][kGroups];
#pragma omp simd
  for (int64_t i = 0; i < groups; ++i) {
    const Words four = philox(noise, first + uint32_t(i), tensor, 0);
    columns[0][i] = four.word[0];
    columns[1][i] = four.word[1];
    columns[2][i] = four.word[2];
    columns[3][i] = four.word[3];
  }
  for (int64_t i = 0; i < groups; ++i)
    for (int64_t j = 0; j < 4; ++j) words[4 * i + j] = columns[j][i];
}

// Returns how many entries need a second draw.
SPARSE_OPTIM_VECTORIZED int32_t divide(const uint32_t* words, int64_t count, const float* scores,
                                       float* out) {
  int32_t refined = 0;
#pragma omp simd reduction(+ : refined)
  for (int64_t i = 0; i < count; ++i) {
    out[i] = perturbed(scores[i], words[i], 0.5f);
    refined += words[i] < kRefinedBelow;
  }
  return refined;
}

}  // namespace

void perturb(const Noise& noise, int64_t tensor, int64_t first, int64_t count, float* scores) {
  uint32_t words[4 * kGroups];
  float out[kMaxTile];
  const int64_t group = first / 4, skipped = first % 4;
  draw(noise, uint32_t(tensor), uint32_t(group), (skipped + count + 3) / 4, words);
  const uint32_t* own = words + skipped;
  const int32_t refined = divide(own, count, scores, out);
  for (int64_t i = 0; refined && i < count; ++i) {
    if (own[i] >= kRefinedBelow) continue;
    const int64_t position = first + i;
    const Words second = philox(noise, uint32_t(position / 4), uint32_t(tensor), 1);
    out[i] = perturbed(scores[i], own[i], refinement(second.word[position % 4]));
  }
  std::copy_n(out, count, scores);
}

}  // namespace sparse_optim::cpu
