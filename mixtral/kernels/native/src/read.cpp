// The read kernel: how fast all threads of the pool together read memory, which is the ceiling of decoding.
#include <atomic>
#include <cstdint>

#include "isa.h"
#include "pool.h"

namespace mx {

MX_EACH_ISA(uint64_t, sum_words, (const uint8_t *from, int64_t count))

// Each thread reads one run of the words.
uint64_t read(const uint8_t *from, int64_t count) {
  std::atomic<uint64_t> sum{0};
  parallel([&](int thread, int threads) {
    const int64_t first = count * thread / threads, last = count * (thread + 1) / threads;
    sum += MX_PICK(sum_words)(from + 8 * first, last - first);
  });
  return sum;
}

}  // namespace mx

extern "C" {

// The sum of `count` words of 64 bits, modulo 2^64.
uint64_t mx_read(const uint8_t *from, int64_t count) { return mx::read(from, count); }
}
