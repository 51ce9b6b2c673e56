#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace mx {
namespace {

using Clock = std::chrono::steady_clock;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// After so many waits in a row that spinning did not shorten, only one in PROBE still spins: on a busy machine the thread
// waited for is often not running, and who spins keeps it from the core.
constexpr int MISSES = 4, PROBE = 64;

// A counter to wait for: spinning at first, where that has helped of late, then asleep.
class Epoch {
 public:
  uint32_t now() const { return value_.load(std::memory_order_acquire); }

  void advance() {
    value_.fetch_add(1);
    if (sleepers_.load() == 0) return;  // who comes to sleep now looks at the value once more
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }

  // Returns when the counter is not at `old` any more; `spin` is in microseconds.
  void wait(uint32_t old, int spin) {
    if (now() != old) return;
    if (spin > 0 && worth_spinning()) {
      if (spun(old, spin)) {
        if (misses_.load(std::memory_order_relaxed)) misses_.store(0, std::memory_order_relaxed);  // others read the line
        return;
      }
      misses_.fetch_add(1, std::memory_order_relaxed);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return value_.load() != old; });
    sleepers_.fetch_sub(1);
  }

 private:
  bool worth_spinning() {
    if (misses_.load(std::memory_order_relaxed) < MISSES) return true;
    return slept_.fetch_add(1, std::memory_order_relaxed) % PROBE == PROBE - 1;
  }

  // Whether the counter left `old` in that time.
  bool spun(uint32_t old, int microseconds) const {
    for (const auto end = Clock::now() + std::chrono::microseconds(microseconds); Clock::now() < end;)
      for (int i = 0; i < 64; ++i) {
        if (now() != old) return true;
        pause();
      }
    return false;
  }

  std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int> misses_{0};  // waits in a row that spinning did not end; not in the line that is spun on
  std::atomic<uint32_t> slept_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Pool {
 public:
  Pool(int count, int spin) : count_(count), spin_(spin) {}

  int count() const { return count_; }
  int spin() const { return spin_; }

  void resize(int count, int spin) {
    std::lock_guard<std::mutex> lock(turn_);
    spin_ = spin;
    if (count == count_) return;
    stop();
    count_ = count;
  }

  void region(void (*body)(void *, int, int), void *context) {
    std::lock_guard<std::mutex> lock(turn_);
    start();
    body_ = body;
    context_ = context;
    begin_.advance();
    body(context, 0, count_);
    barrier();
  }

  void barrier() {
    const uint32_t old = gate_.now();
    if (arrived_.fetch_add(1) + 1 < count_) return gate_.wait(old, spin_);
    arrived_.store(0);
    gate_.advance();
  }

 private:
  // A system that gives no more threads leaves us those we have.
  void start() {
    const uint32_t seen = begin_.now();
    while (static_cast<int>(workers_.size()) + 1 < count_) {
      try {
        workers_.emplace_back(&Pool::work, this, static_cast<int>(workers_.size()) + 1, seen);
      } catch (const std::system_error &) {
        count_ = static_cast<int>(workers_.size()) + 1;
      }
    }
  }

  void stop() {
    body_ = nullptr;
    begin_.advance();
    for (std::thread &worker : workers_) worker.join();
    workers_.clear();
  }

  void work(int thread, uint32_t seen) {
    for (;; ++seen) {
      begin_.wait(seen, spin_);
      if (!body_) return;
      body_(context_, thread, count_);
      barrier();
    }
  }

  std::atomic<int> count_;
  std::atomic<int> spin_;  // microseconds
  std::mutex turn_;  // one region at a time
  std::vector<std::thread> workers_;
  void (*body_)(void *, int, int) = nullptr;
  void *context_ = nullptr;
  Epoch begin_, gate_;
  std::atomic<int> arrived_{0};
};

Pool *pool = nullptr;

// A forked child has none of its parent's threads, and may find locks held by them: it gets a pool of its own, and leaves
// the old one where it is. At the process's end the threads are asleep and end with it: the pool is never destroyed.
void after_fork() { pool = new Pool(pool->count(), pool->spin()); }

const bool made = [] {
  pool = new Pool(1, 0);
  return pthread_atfork(nullptr, nullptr, after_fork) == 0;
}();

}  // namespace

void set_threads(int threads, int spin_microseconds) { pool->resize(threads, spin_microseconds); }
int threads() { return pool->count(); }
void parallel_region(void (*body)(void *, int, int), void *context) { pool->region(body, context); }
void barrier() { pool->barrier(); }

}  // namespace mx

extern "C" {

// `threads` at least 1; see pool.h.
void mx_set_threads(int threads, int spin_microseconds) { mx::set_threads(threads, spin_microseconds); }
int mx_threads() { return mx::threads(); }
}
