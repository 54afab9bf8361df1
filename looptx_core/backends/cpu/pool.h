// Threads that share the ranges of a pass.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Threads that help the caller with a range of things. Whoever is free takes the next piece, the
// caller too, so a thread that the system has put aside holds up no more than the piece in its
// hands. Between ranges helpers spin for a moment, as the next one is near, and then sleep.
class Pool {
  public:
    explicit Pool(int size) {
        for (int i = 1; i < size; ++i) helpers.emplace_back([this] { help(); });
    }

    ~Pool() {
        leaving.store(true);
        ticket.fetch_add(ROUND);
        wake_all();
        for (auto& helper : helpers) helper.join();
    }

    // work(begin, end) over pieces of 0 .. count, each a multiple of `unit`.
    template <class Work> void each(int count, int unit, Work&& work) {
        const int pieces = 4 * ((int)helpers.size() + 1);
        const int size = std::max(unit, (count + pieces - 1) / pieces / unit * unit);
        if (helpers.empty() || count <= size) {
            if (count) work(0, count);
            return;
        }
        using Plain = std::remove_reference_t<Work>;
        // Closed first: a helper must not take a piece of this range by the last one's ticket.
        const uint64_t round = (ticket.load(std::memory_order_relaxed) & ~CLOSED) + ROUND;
        ticket.store(round | CLOSED);
        context.store(&work), end.store(count), step.store(size), done.store(0);
        task.store([](void* c, int from, int to) { (*static_cast<Plain*>(c))(from, to); });
        ticket.store(round);
        if (asleep.load()) wake_all();
        while (piece(ticket.load()) == TAKEN) {}
        while (done.load(std::memory_order_acquire) < count) relax();
        if (failed.exchange(false)) throw std::bad_alloc();  // of whichever thread
    }

  private:
    enum Outcome { TAKEN, NOTHING };
    static constexpr uint64_t ROUND = 1ull << 32, CLOSED = ROUND - 1;

    // Do the next piece of the range that `now` belongs to, if one is left.
    Outcome piece(uint64_t now) {
        const uint64_t from = now & CLOSED;
        const int limit = end.load(), size = step.load();
        auto* run = task.load();
        void* with = context.load();
        if (from == CLOSED || (int)from >= limit) return NOTHING;
        // If the ticket is still the same, so is all that was read above.
        if (!ticket.compare_exchange_strong(now, now + size)) return TAKEN;
        const int to = std::min((int)from + size, limit);
        try {
            run(with, (int)from, to);
        } catch (...) {
            failed.store(true);
        }
        done.fetch_add(to - (int)from, std::memory_order_release);
        return TAKEN;
    }

    void help() {
        while (!leaving.load()) {
            const uint64_t now = ticket.load();
            if (piece(now) == TAKEN) continue;
            for (int spins = 0; spins < SPINS && ticket.load(std::memory_order_acquire) == now;
                 ++spins)
                relax();
            if (ticket.load() != now) continue;
            std::unique_lock<std::mutex> lock(mutex);
            asleep.fetch_add(1);
            wake.wait(lock, [&] { return ticket.load() != now; });
            asleep.fetch_sub(1);
        }
    }

    void wake_all() {
        { std::lock_guard<std::mutex> lock(mutex); }
        wake.notify_all();
    }

    static constexpr int SPINS = 4000;  // about a tenth of a millisecond
    std::vector<std::thread> helpers;
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<uint64_t> ticket{CLOSED};  // round, and where the next piece begins
    std::atomic<int> done{0}, end{0}, step{1}, asleep{0};
    std::atomic<void (*)(void*, int, int)> task{nullptr};
    std::atomic<void*> context{nullptr};
    std::atomic<bool> leaving{false}, failed{false};
};

}  // namespace
