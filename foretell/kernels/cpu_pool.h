// A thread pool for short loops on machines that are not ours alone.
//
// An OpenMP loop ends when every thread has arrived, also those that got nothing to do: where another process holds
// a core, each loop waits for a time slice. Here tasks are claimed one at a time, the caller works as well, and waits
// only for tasks that someone has begun. A thread that is not running delays nothing.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace foretell {

using i64 = int64_t;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  typedef void (*Task)(void* context, i64 index);

  // Run task(context, 0 … count-1) on up to `threads` threads, this one included.
  void run(i64 count, int threads, Task task, void* context) {
    if (busy_.exchange(true, std::memory_order_acquire)) {  // another caller has the pool: work alone
      for (i64 i = 0; i < count; i++) task(context, i);
      return;
    }
    while (workers_ < threads - 1) std::thread(&Pool::work, this, workers_++).detach();
    uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(generation << 32 | kClosed);  // no claim on the former job can succeed from here on
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    helpers_.store(threads - 1, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(generation << 32);
    if (sleepers_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    while (claim()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) != count; spins++) {
      if (spins < 2000) relax();
      else sched_yield();  // whoever has the last task may need this core
    }
    busy_.store(false, std::memory_order_release);
  }

 private:
  static constexpr uint64_t kClosed = 0xffffffffu;
  static constexpr int kSpinMicroseconds = 200;  // longer than Python takes between two kernels

  // Claim and do one task of the job on offer; false when there is none left.
  bool claim() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      i64 index = i64(ticket & kClosed);
      Task task = task_.load(std::memory_order_relaxed);
      void* context = context_.load(std::memory_order_relaxed);
      if (index >= count_.load(std::memory_order_relaxed)) return false;
      // What was read belongs to this job: it changes only after the ticket has, and then the exchange fails.
      if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
        task(context, index);
        done_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }

  void work(int id) {
    uint64_t seen = 0;
    for (;;) {
      seen = await_other_than(seen);
      if (id < helpers_.load(std::memory_order_relaxed))
        while (claim()) {
        }
    }
  }

  // Spin for a while, then sleep, until the ticket's generation is another; returns it.
  uint64_t await_other_than(uint64_t seen) {
    auto start = std::chrono::steady_clock::now();
    for (;;) {
      for (int i = 0; i < 64; i++) {
        uint64_t generation = ticket_.load(std::memory_order_acquire) >> 32;
        if (generation != seen) return generation;
        relax();
      }
      if (std::chrono::steady_clock::now() - start > std::chrono::microseconds(kSpinMicroseconds)) break;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return ticket_.load() >> 32 != seen; });
    sleepers_.fetch_sub(1);
    return ticket_.load(std::memory_order_acquire) >> 32;
  }

  std::atomic<uint64_t> ticket_{kClosed};  // generation of the job << 32 | next task
  std::atomic<Task> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<i64> count_{0}, done_{0};
  std::atomic<int> helpers_{0}, sleepers_{0};
  std::atomic<bool> busy_{false};
  int workers_ = 0;  // changed by the caller that holds busy_
  std::mutex mutex_;
  std::condition_variable wake_;
};

extern Pool* g_pool;
extern int g_threads;

// f(0) … f(count - 1), on up to `threads` threads.
template <class F>
void parallel(i64 count, int threads, F&& f) {
  if (threads <= 1 || count <= 1) {
    for (i64 i = 0; i < count; i++) f(i);
    return;
  }
  g_pool->run(count, threads, [](void* context, i64 i) { (*static_cast<std::remove_reference_t<F>*>(context))(i); }, &f);
}

// f(begin, end) over [0, n), in three runs per thread so that a late thread's share can go to another.
template <class F>
void parallel_runs(i64 n, int threads, F&& f) {
  i64 runs = threads <= 1 ? 1 : threads * 3 < n ? threads * 3 : n;
  parallel(runs, threads, [&](i64 i) { f(n * i / runs, n * (i + 1) / runs); });
}

}  // namespace foretell
