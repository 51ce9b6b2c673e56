// The pool and the step driven by several threads at once, for ThreadSanitizer: each thread has a model, plan, scratch and
// cache of its own and must get the bits it gets alone, while another one changes the number of threads of the pool.
// Prints what it did; exits with 1 when bits differ. Argument: seconds.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "pool.h"
#include "step.h"

extern "C" void mx_set_threads(int threads, int spin_microseconds);

namespace {

constexpr int kDim = 64, kHeads = 4, kKvHeads = 2, kWidth = 16, kFfn = 96, kExperts = 4, kVocab = 50, kLayers = 2;
constexpr int kBlockSize = 8, kBlocks = 16, kPositions = kBlockSize * kBlocks, kTaken = 2;

std::vector<float> numbers(size_t n, unsigned seed, float scale) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> out(n);
  for (float &x : out) x = normal(random);
  return out;
}

// A model whose packed fp32 weights are any numbers: the layout does not matter here.
struct Network {
  std::vector<std::vector<float>> held;
  std::vector<mx::Expert> experts;
  std::vector<mx::Layer> layers;
  mx::Model model{};

  const float *some(size_t n, float scale) {
    held.push_back(numbers(n, static_cast<unsigned>(held.size()), scale));
    return held.back().data();
  }

  mx::Matrix matrix(int n, int d) {
    mx::Matrix w{nullptr, mx::kFp32, n, d};
    w.data = some(static_cast<size_t>(w.blocks()) * 16 * static_cast<size_t>(w.groups()) * 32, 0.2f);
    return w;
  }

  Network() {
    experts.reserve(kLayers * kExperts);
    for (int layer = 0; layer < kLayers; ++layer) {
      mx::Layer l{};
      l.attention_norm = some(kDim, 1.0f), l.ffn_norm = some(kDim, 1.0f);
      l.wqkv = matrix((kHeads + 2 * kKvHeads) * kWidth, kDim), l.wo = matrix(kDim, kHeads * kWidth);
      l.router = some(kExperts * kDim, 0.5f);
      l.experts = experts.data() + experts.size();
      for (int e = 0; e < kExperts; ++e) experts.push_back({matrix(kFfn, kDim), matrix(kFfn, kDim), matrix(kDim, kFfn)});
      l.n_experts = kExperts, l.ffn_dim = kFfn;
      l.in_kinds = l.out_kinds = 1 << mx::kFp32Rows;
      layers.push_back(l);
    }
    model = {kDim, kHeads, kKvHeads, kWidth, kFfn, kExperts, 1, 0, mx::kFloat32, 1e-5f, layers.data(),
             some(kVocab * kDim, 1.0f), {}, some(kDim, 1.0f), matrix(kVocab, kDim)};
  }
};

// Processes `chunks` tokens at a time and returns all logits.
std::vector<float> answer(const Network &network, const std::vector<int> &chunks, unsigned seed) {
  const int64_t head = int64_t{kPositions} * kWidth * 4, value = kKvHeads * head, layer = 2 * value;
  std::vector<uint8_t> cache(static_cast<size_t>(kLayers * layer));
  std::vector<int64_t> blocks;
  for (int b = 0; b < kBlocks; ++b) blocks.push_back(kBlocks - 1 - b);
  const mx::Pages pages{cache.data(), kBlockSize, layer, value, kWidth * 4, head};
  const std::vector<float> angles = numbers(kPositions * kWidth / 2, 7, 1.0f);
  std::mt19937 random(seed);
  std::vector<float> all;
  int64_t done = 0;
  for (const int n : chunks) {
    std::vector<int64_t> tokens(static_cast<size_t>(n)), wanted(tokens.size()), experts(tokens.size() * kLayers * kTaken);
    std::vector<float> x(tokens.size() * kDim), logits(tokens.size() * kVocab), weights(experts.size());
    std::vector<float> router(tokens.size() * kLayers * kExperts);
    for (int i = 0; i < n; ++i) tokens[static_cast<size_t>(i)] = random() % kVocab, wanted[static_cast<size_t>(i)] = i;
    const mx::Sequence sequence{0, n, done, blocks.data()};
    mx::Plan plan{&network.model, n, 1, n, kTaken, 0, kLayers, 0, 0, mx::kFloat32, pages, &sequence, nullptr, nullptr,
                  tokens.data(), angles.data(), angles.data(), wanted.data(), x.data(), logits.data(), router.data(),
                  experts.data(), weights.data(), nullptr};
    int32_t failed = 1;
    while (failed) {  // another thread has asked for more threads since
      const int64_t size = mx_step_scratch(&plan);
      std::vector<uint8_t> scratch(static_cast<size_t>(size) + 64);
      plan.scratch = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
      failed = mx_step(&plan, size);
    }
    all.insert(all.end(), logits.begin(), logits.end());
    done += n;
  }
  return all;
}

}  // namespace

int main(int, char **arguments) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(arguments[1]));
  const std::vector<std::vector<int>> cuts = {{1, 1, 1, 40, 1, 1}, {90, 1, 1, 1}, {3, 1, 17, 1, 1}, {64, 32, 1, 1, 1, 1}};
  std::vector<Network> networks(cuts.size());
  std::vector<std::vector<float>> want;
  for (unsigned i = 0; i < cuts.size(); ++i) want.push_back(answer(networks[i], cuts[i], i));
  std::atomic<int> answers{0}, wrong{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < cuts.size(); ++i)
    threads.emplace_back([&, i] {
      while (std::chrono::steady_clock::now() < end) {
        wrong += answer(networks[i], cuts[i], i) != want[i];
        ++answers;
      }
    });
  std::thread changing([&] {
    for (int n = 0; !stop; ++n) {
      mx_set_threads(1 + n % 4, n % 3 * 20);
      std::this_thread::sleep_for(std::chrono::milliseconds(3));
    }
  });
  for (std::thread &thread : threads) thread.join();
  stop = true;
  changing.join();
  std::printf("%d answers by %zu threads, %d of them with other bits than alone\n", answers.load(), threads.size(), wrong.load());
  return wrong ? 1 : 0;
}
