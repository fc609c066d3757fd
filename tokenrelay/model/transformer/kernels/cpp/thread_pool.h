// A thread pool for tasks of some microseconds. Knows nothing of kernels.
//
// Each thread has a part of the tasks, in order, so what one call wrote is in the cache of the thread that reads it in the
// next. Tasks are claimed one by one from an atomic word of the part; who has none left takes the last ones of others. Only
// claimed tasks are waited for: a worker that the system has put aside delays nobody. Workers spin briefly for the next call,
// then sleep, so an idle server uses no processor.
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
        const int threads = wanted_ < MAX_THREADS ? int(wanted_) : MAX_THREADS;
        if (count <= 1 || threads <= 1 || count >= MAX_TASKS) {
            for (int64_t i = 0; i < count; i++) task(context, i);
            return;
        }
        for (; started_ < threads - 1; started_++) std::thread(&ThreadPool::work, this, started_ + 1).detach();
        task_ = task;
        context_ = context;
        count_.store(uint32_t(count), std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        parts_.store(threads, std::memory_order_relaxed);
        for (int i = 0; i < threads; i++)
            left_[i].word.store(uint64_t(count * (i + 1) / threads) << 32 | uint64_t(count * i / threads),
                                std::memory_order_release);
        calls_.fetch_add(1);
        calls_.notify_all();
        work_through(0);
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

    // Runs the first task that is left of a part, or the last one. The word holds the end and the next index together: whoever
    // swaps it owns a task of the current call, which cannot return before that task is done, so task_, context_ and count_ are
    // safe to read.
    bool claim(int part, bool last) {
        std::atomic<uint64_t>& left = left_[part].word;
        uint64_t word = left.load(std::memory_order_acquire);
        do {
            if (uint32_t(word) >= word >> 32) return false;
        } while (!left.compare_exchange_weak(word, last ? word - (uint64_t(1) << 32) : word + 1, std::memory_order_acq_rel));
        const uint32_t count = count_.load(std::memory_order_relaxed);
        task_(context_, last ? (word >> 32) - 1 : uint32_t(word));
        if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) done_.notify_one();
        return true;
    }

    void work_through(int own) {
        while (claim(own, false)) {}
        const int parts = parts_.load(std::memory_order_relaxed);
        for (int i = 1; i < parts; i++)
            while (claim((own + i) % parts, true)) {}
    }

    void work(int index) {
        for (uint32_t seen = calls_.load();;) {
            wait_until([&] { return calls_.load(std::memory_order_acquire) != seen; }, calls_);
            seen = calls_.load(std::memory_order_acquire);
            if (index < wanted_) work_through(index);
        }
    }

    static constexpr int MAX_THREADS = 256;
    struct alignas(64) Part {
        std::atomic<uint64_t> word{0};
    };

    std::mutex mutex_;  // one call at a time
    std::atomic<int> wanted_{1};
    int started_ = 0;
    Part left_[MAX_THREADS];
    std::atomic<uint32_t> count_{0};
    std::atomic<int> parts_{1};
    alignas(64) std::atomic<uint32_t> done_{0};
    alignas(64) std::atomic<uint32_t> calls_{0};
    Task task_ = nullptr;
    void* context_ = nullptr;
};
