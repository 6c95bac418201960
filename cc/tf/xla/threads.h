// Adapts XLA's intra-op thread pool to the CPU kernels.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "cpu/run.h"
#include "xla/ffi/api/ffi.h"

namespace performer {

// One parallel loop, cut into blocks. The calling thread takes blocks as the threads of the pool
// do, and waits only for blocks that have begun. So a busy pool, even one without a free thread,
// costs time but cannot deadlock. A thread that comes late finds no block left. It may outlive the
// call: therefore it holds the loop by shared_ptr, and uses `body` only for a block that it took.
class ParallelLoop {
 public:
  using Body = std::function<void(int64_t begin, int64_t end)>;

  ParallelLoop(int64_t count, int64_t blocks, const Body& body)
      : count_(count), blocks_(blocks), body_(body) {}

  // Runs blocks until none is left.
  void Work() {
    for (int64_t block = next_++; block < blocks_; block = next_++) {
      // count * block / blocks may overflow.
      const int64_t size = count_ / blocks_, rest = count_ % blocks_;
      const int64_t begin = size * block + std::min(block, rest);
      body_(begin, begin + size + (block < rest ? 1 : 0));
      if (++done_ == blocks_) {
        const std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_all();
      }
    }
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == blocks_; });
  }

 private:
  const int64_t count_, blocks_;
  const Body& body_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// The result is valid as long as `pool`.
inline cpu::Threads ThreadsOf(xla::ffi::ThreadPool& pool) {
  // It pays to wake a thread for this much work. With more blocks than threads, a slow thread does
  // fewer of them.
  constexpr int64_t kWorthwhileNanoseconds = 30000, kBlocksPerThread = 4;
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const auto parallel_for = [&pool, threads](int64_t count, int64_t cost,
                                             const ParallelLoop::Body& body) {
    const double nanoseconds = static_cast<double>(count) * static_cast<double>(cost);
    const int64_t useful = static_cast<int64_t>(
        std::min(nanoseconds / kWorthwhileNanoseconds, static_cast<double>(threads)));
    if (count <= 1 || useful <= 1) {
      if (count > 0) body(0, count);
      return;
    }
    const int64_t blocks = std::min(count, useful * kBlocksPerThread);
    const auto loop = std::make_shared<ParallelLoop>(count, blocks, body);
    for (int64_t i = 1; i < std::min(useful, blocks); ++i) pool.Schedule([loop] { loop->Work(); });
    loop->Work();
    loop->Wait();
  };
  return {threads, parallel_for};
}

}  // namespace performer
