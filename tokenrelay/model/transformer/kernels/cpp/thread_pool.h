// A thread pool for tasks of some microseconds. Knows nothing of kernels.
//
// Tasks are claimed one by one from an atomic word, and only claimed tasks are waited for: a worker that the system has
// put aside delays nobody. Workers spin briefly for the next call, then sleep, so an idle server uses no processor.
// Not OpenMP: torch ships its own libgomp, and two pools would fight for the cores.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

class ThreadPool {
  public:
    using Task = void (*)(void*, int64_t);

    void set_num_threads(int count) {
        std::lock_guard<std::mutex> guard(mutex_);
        wanted_ = count < 1 ? 1 : count;
    }

    int num_threads() const { return wanted_; }

    void run(int64_t count, Task task, void* context) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (count <= 1 || wanted_ <= 1 || count >= MAX_TASKS) {
            for (int64_t i = 0; i < count; i++) task(context, i);
            return;
        }
        for (; started_ < wanted_ - 1; started_++) std::thread(&ThreadPool::work, this, started_).detach();
        task_ = task;
        context_ = context;
        done_.store(0, std::memory_order_relaxed);
        claims_.store(uint64_t(count) << 32, std::memory_order_release);
        calls_.fetch_add(1);
        calls_.notify_all();
        while (claim()) {}
        wait_until([&] { return done_.load(std::memory_order_acquire) == uint32_t(count); }, done_);
    }

  private:
    static constexpr int64_t MAX_TASKS = int64_t(1) << 31;
    static constexpr std::chrono::microseconds SPIN{200};

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    // Spins for a while, then sleeps until `word` changes; returns when ready() holds.
    template <class Ready> static void wait_until(Ready ready, std::atomic<uint32_t>& word) {
        auto limit = std::chrono::steady_clock::now() + SPIN;
        for (;;) {
            for (int i = 0; i < 32; i++) {
                if (ready()) return;
                pause();
            }
            uint32_t seen = word.load();
            if (ready()) return;
            if (std::chrono::steady_clock::now() > limit) word.wait(seen);
        }
    }

    // Runs one task, if one is left. The word holds count and next index together: whoever swaps it owns a task of the
    // current call, which cannot return before that task is done, so task_ and context_ are safe to read.
    bool claim() {
        uint64_t word = claims_.load(std::memory_order_acquire);
        do {
            if (uint32_t(word) >= word >> 32) return false;
        } while (!claims_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel));
        uint32_t count = word >> 32;
        task_(context_, uint32_t(word));
        if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) done_.notify_one();
        return true;
    }

    void work(int index) {
        for (uint32_t seen = calls_.load();;) {
            wait_until([&] { return calls_.load(std::memory_order_acquire) != seen; }, calls_);
            seen = calls_.load(std::memory_order_acquire);
            while (index < wanted_ - 1 && claim()) {}
        }
    }

    std::mutex mutex_;  // one call at a time
    std::atomic<int> wanted_{1};
    int started_ = 0;
    alignas(64) std::atomic<uint64_t> claims_{0};
    alignas(64) std::atomic<uint32_t> done_{0};
    alignas(64) std::atomic<uint32_t> calls_{0};
    Task task_ = nullptr;
    void* context_ = nullptr;
};
