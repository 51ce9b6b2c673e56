// Which instruction set runs: asked of the processor once, and of tests.
#include "isa.h"

#include <atomic>
#include <cstring>

namespace mx {
namespace {

const char *const kNames[] = {"portable", "avx2", "avx512"};

bool built(Isa isa) {
  if (isa == Isa::avx512) return MX_IF_AVX512(true ||) false;
  if (isa == Isa::avx2) return MX_IF_AVX2(true ||) false;
  return true;
}

// __builtin_cpu_supports also asks whether the system saves the wide registers. Every processor with FMA has F16C.
bool supported(Isa isa) {
#if defined(MX_STAND_IN)  // for tests: what is compiled as avx512 runs on any processor with AVX2 (tools/stand_in)
  if (isa == Isa::avx512) return supported(Isa::avx2);
#endif
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::portable;
}

bool usable(Isa isa) { return built(isa) && supported(isa); }

Isa best() { return usable(Isa::avx512) ? Isa::avx512 : usable(Isa::avx2) ? Isa::avx2 : Isa::portable; }

std::atomic<Isa> chosen{best()};

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

}  // namespace mx

extern "C" {

// The name of the instruction set in use.
const char *mx_isa() { return mx::kNames[static_cast<int>(mx::isa())]; }

// A hash of the headers that this library was made from (setup.py).
const char *mx_headers() { return MX_HEADERS; }

// Use another one; null: the best again. Returns 0, or 1 when the name is unknown, not built, or not this processor's.
int mx_set_isa(const char *name) {
  if (!name) {
    mx::chosen = mx::best();
    return 0;
  }
  for (int i = 0; i < 3; ++i)
    if (!std::strcmp(name, mx::kNames[i]) && mx::usable(static_cast<mx::Isa>(i))) {
      mx::chosen = static_cast<mx::Isa>(i);
      return 0;
    }
  return 1;
}
}
