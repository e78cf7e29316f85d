// The order in which entries win, as one number: 93 bits, larger is better, no two alike.
//
//   31 bits  the importance key
//   62 bits  ones, less tensor << bits.position | position, from the left: the lower place is
//   better
//
// The quota-th largest by radix selection is then exact, ties and all. Tensor and position take
// only as many bits as the step's numbers need, so that a few digits say which tied entries belong.
#pragma once
#include "cuda/select.h"

namespace sparse_optim::cuda {

constexpr int kKeyBits = 31, kPlaceBits = 62;

// How many bits hold a tensor's number and a position: 1 to 31 each.
struct PlaceBits {
  int32_t tensor, position;

  SPARSE_OPTIM_INLINE int64_t joined_last() const {
    return (int64_t(1) << (tensor + position)) - 1;
  }
};

inline int32_t bits_of(int64_t largest) {
  int32_t bits = 1;
  while (bits < 31 && largest >> bits) ++bits;
  return bits;
}

struct EntryRank {
  uint64_t high, low;  // 64 bits, and 29 from the left
};

// The last entry of an order: all that are as good belong.
struct Limit {
  int32_t key;
  uint64_t place;

  SPARSE_OPTIM_INLINE bool admits(int32_t other, uint64_t at) const {
    return other > key || (other == key && at <= place);
  }
};

SPARSE_OPTIM_INLINE EntryRank rank_of(int32_t key, uint64_t place, PlaceBits bits) {
  const uint64_t joined = place >> 32 << bits.position | (place & 0xffffffffu);
  const uint64_t left = (uint64_t(bits.joined_last()) - joined)
                        << (kPlaceBits - bits.tensor - bits.position);
  return {uint64_t(key) << (64 - kKeyBits) | left >> 29, left << 35};
}

// The last entry whose rank is at least `cut`, where cut's bits from some digit on are 0.
SPARSE_OPTIM_INLINE Limit limit_of(const EntryRank& cut, PlaceBits bits) {
  const uint64_t left = (cut.high & ((uint64_t(1) << 33) - 1)) << 29 | cut.low >> 35;
  const uint64_t joined =
      uint64_t(bits.joined_last()) - (left >> (kPlaceBits - bits.tensor - bits.position));
  const uint64_t position = joined & ((uint64_t(1) << bits.position) - 1);
  return {int32_t(cut.high >> (64 - kKeyBits)), joined >> bits.position << 32 | position};
}

// Some bits of a rank, counted from the left; those of one digit are all in one of the two words.
struct RankDigit {
  int offset, bits;

  SPARSE_OPTIM_INLINE int of(const EntryRank& rank) const {
    const uint64_t word = offset < 64 ? rank.high << offset : rank.low << (offset - 64);
    return int(word >> (64 - bits));
  }
  // Whether a rank has the digits of `cut` before this one. The first digit is not asked.
  SPARSE_OPTIM_INLINE bool follows(const EntryRank& cut, const EntryRank& rank) const {
    const uint64_t high = cut.high ^ rank.high, low = cut.low ^ rank.low;
    if (offset <= 64) return high >> (64 - offset) == 0;
    return high == 0 && low >> (128 - offset) == 0;
  }
  SPARSE_OPTIM_INLINE void set(EntryRank& cut, int value) const {
    if (offset < 64) cut.high |= uint64_t(value) << (64 - offset - bits);
    else cut.low |= uint64_t(value) << (128 - offset - bits);
  }
  SPARSE_OPTIM_INLINE bool is_last() const { return offset + bits == kKeyBits + kPlaceBits; }
};

#if defined(SPARSE_OPTIM_RANK_DIGIT_BITS)  // a test of its own
constexpr int kRankDigitBits = SPARSE_OPTIM_RANK_DIGIT_BITS;
#elif defined(SPARSE_OPTIM_EMULATED)  // small: small cases then need more digits than a call has
constexpr int kRankDigitBits = 6;
#else
constexpr int kRankDigitBits = 11;
#endif

// The digit that digit_of(0) takes of a key.
constexpr RankDigit kFirstRankDigit{0, 11};

SPARSE_OPTIM_INLINE RankDigit digit_after(RankDigit digit) {
  const int offset = digit.offset + digit.bits;
  const int left = (offset < 64 ? 64 : kKeyBits + kPlaceBits) - offset;
  return {offset, left < kRankDigitBits ? left : kRankDigitBits};
}

}  // namespace sparse_optim::cuda
