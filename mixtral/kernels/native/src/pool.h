// A pool of threads that stays: workers spin for some tens of microseconds after a task, then sleep. Made anew in a
// forked child. Two callers at once take turns.
#pragma once

namespace mx {

// How many threads a parallel region has, the caller included, and for how long a waiting thread spins before it sleeps.
// With more threads than cores spinning only takes time from those who work: give 0 microseconds then.
void set_threads(int threads, int spin_microseconds);
int threads();

// Runs body(context, thread, threads) on every thread, the caller being thread 0; returns when all are done. A body
// must not start a region itself, nor throw.
void parallel_region(void (*body)(void *context, int thread, int threads), void *context);

template <class Body>
void parallel(const Body &body) {
  parallel_region([](void *context, int thread, int threads) { (*static_cast<const Body *>(context))(thread, threads); },
                  const_cast<Body *>(&body));
}

// Inside a region: waits until every thread has come here. What they wrote before is visible after.
void barrier();

// The part of `count` things that belongs to one thread, [first, last), in multiples of `step` but for the end.
struct Share {
  int first, last;
};

inline Share share(int count, int thread, int threads, int step = 1) {
  const long steps = (count + step - 1) / step;
  const int first = static_cast<int>(steps * thread / threads) * step;
  const int last = static_cast<int>(steps * (thread + 1) / threads) * step;
  return {first, last < count ? last : count};
}

}  // namespace mx
