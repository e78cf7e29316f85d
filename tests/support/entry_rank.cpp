// Checks csrc/cuda/entry_rank.h with the digits that it has on a GPU, on random entries: ranks
// order entries, and each digit narrows the choice down to what has the digits before. Prints the
// digits.
#include "cuda/entry_rank.h"

#include <cstdio>
#include <random>

#include "emulator.h"

using namespace sparse_optim::cuda;

namespace {

struct Entry {
  int32_t key;
  uint64_t tensor, position;

  uint64_t place() const { return tensor << 32 | position; }
};

bool better(const Entry& a, const Entry& b) {
  return a.key != b.key ? a.key > b.key : a.place() < b.place();
}

bool at_least(const EntryRank& a, const EntryRank& b) {
  return a.high != b.high ? a.high > b.high : a.low >= b.low;
}

struct Draw {
  std::mt19937_64 random{1};

  uint64_t below(uint64_t end) { return random() % end; }

  Entry entry(PlaceBits bits) {
    const uint64_t tensors = uint64_t(1) << bits.tensor;
    const uint64_t positions = uint64_t(1) << bits.position;
    const int32_t keys[] = {1, 0x7f800000, 0x3f800000 + int32_t(below(3)),
                            1 + int32_t(below(0x7f800000))};
    return {keys[below(4)], below(8) ? below(tensors) : tensors - 1,
            below(8) ? below(positions) : positions - 1};
  }
};

// How many statements about two entries are wrong.
int64_t faults(const Entry& mine, const Entry& other, PlaceBits bits) {
  const EntryRank rank = rank_of(mine.key, mine.place(), bits);
  const EntryRank others = rank_of(other.key, other.place(), bits);
  int64_t wrong = at_least(rank, others) == better(other, mine);
  EntryRank cut{0, 0};
  bool same = true;
  for (RankDigit digit = kFirstRankDigit;; digit = digit_after(digit)) {
    if (digit.offset > 0) wrong += digit.follows(cut, others) != same;
    same = same && digit.of(rank) == digit.of(others);
    digit.set(cut, digit.of(rank));
    const Limit limit = limit_of(cut, bits);
    wrong += limit.admits(other.key, other.place()) != at_least(others, cut);
    wrong += !limit.admits(mine.key, mine.place());
    if (!digit.is_last()) continue;
    return wrong + (limit.key != mine.key) + (limit.place != mine.place());
  }
}

}  // namespace

int main() {
  for (RankDigit digit = kFirstRankDigit;; digit = digit_after(digit)) {
    std::printf("%d ", digit.bits);
    if (digit.is_last()) break;
  }
  Draw draw;
  int64_t wrong = 0;
  for (int i = 0; i < 300000; ++i) {
    const PlaceBits bits{int32_t(1 + draw.below(31)), int32_t(1 + draw.below(31))};
    const Entry mine = draw.entry(bits);
    Entry other = draw.entry(bits);
    if (draw.below(2)) other.key = mine.key;
    if (draw.below(4) == 0) other.tensor = mine.tensor;
    wrong += faults(mine, other, bits);
  }
  std::printf("\n%lld faults\n", static_cast<long long>(wrong));
}
