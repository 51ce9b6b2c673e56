// Products of the portable kernels as a program: for a processor that this machine emulates (tests/kernels/test_cross.py).
//
// Standard input: cases one after the other, each of int32 format, n, d, rows and int64 bytes of the packed weight, the
// weight, and rows x d floats. Standard output: rows x (blocks x 16) floats each.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "packed.h"
#include "pool.h"

extern "C" {
int mx_linear(const mx::Matrix *w, const float *x, int64_t x_stride, int rows, float *out, int64_t out_stride);
void mx_set_threads(int threads, int spin_microseconds);
}

template <class T>
bool read(std::vector<T> &into) {
  return std::fread(into.data(), sizeof(T), into.size(), stdin) == into.size();
}

int main() {
  mx_set_threads(2, 0);
  for (;;) {
    std::vector<int32_t> head(4);
    std::vector<int64_t> bytes(1);
    if (!read(head)) return 0;
    if (!read(bytes)) return 1;
    void *weight = std::aligned_alloc(64, (bytes[0] + 63) / 64 * 64);
    std::vector<float> x(static_cast<size_t>(head[3]) * head[2]);
    if (std::fread(weight, 1, bytes[0], stdin) != static_cast<size_t>(bytes[0]) || !read(x)) return 1;
    const mx::Matrix w{weight, head[0], head[1], head[2]};
    std::vector<float> out(static_cast<size_t>(head[3]) * w.blocks() * mx::kBlock);
    if (mx_linear(&w, x.data(), head[2], head[3], out.data(), w.blocks() * mx::kBlock)) return 1;
    std::fwrite(out.data(), sizeof(float), out.size(), stdout);
    std::free(weight);
  }
}
