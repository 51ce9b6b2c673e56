// Reading memory and nothing else: the words are added up, so that the loads cannot be left out.
#include <cstdint>
#include <cstring>

namespace mx {
namespace MX_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 64;  // bytes of a register
#elif defined(__AVX2__)
constexpr int kWidth = 32;
#else
constexpr int kWidth = 16;
#endif
typedef uint64_t Words __attribute__((vector_size(kWidth)));

constexpr int kLine = 64;             // bytes of a cache line
constexpr int64_t kApart = 64 << 10;  // bytes from stream to stream: each has pages of its own, fetched ahead by itself

Words load(const uint8_t *from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

}  // namespace

// The sum of `count` words of 64 bits, modulo 2^64; `from` needs no alignment. Four streams take turns, a line of each:
// on Zen 3 they are 1.3 times as fast as one, and faster than torch's matrix-vector product.
uint64_t sum_words(const uint8_t *from, int64_t count) {
  const uint8_t *const end = from + 8 * count;
  Words a = {}, b = {}, c = {}, d = {};
  for (; end - from >= 4 * kApart; from += 4 * kApart)
    for (const uint8_t *line = from; line < from + kApart; line += kLine)
      for (int at = 0; at < kLine; at += kWidth) {
        a += load(line + at);
        b += load(line + at + kApart);
        c += load(line + at + 2 * kApart);
        d += load(line + at + 3 * kApart);
      }
  uint64_t sum = 0;
  for (; from < end; from += 8) {
    uint64_t word;
    std::memcpy(&word, from, sizeof word);
    sum += word;
  }
  a += b + c + d;
  for (int i = 0; i < kWidth / 8; ++i) sum += a[i];
  return sum;
}

}  // namespace MX_ISA
}  // namespace mx
