// A team of threads that goes through many short loops together.
//
// A forward pass of one token is dozens of loops of a few microseconds; starting the threads anew
// for each costs as much. Here they are started once and run the same code. Each loop's blocks are
// handed out from a counter, and a thread that finds none left waits until all are done. Nobody
// waits for a thread that does not come: with fewer threads than asked for, the others do it all,
// and one that comes late finds every loop finished.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "cpu/amx.h"
#include "cpu/parallel.h"
#include "cpu/x86.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

class Team {
 public:
  // For up to n_loops loops.
  explicit Team(std::int64_t n_loops) : loops_(new Loop[n_loops]) {}
  Team(const Team&) = delete;
  ~Team() { delete[] loops_; }

  // Runs body(member) on up to n_threads threads; each must call for_each in the same order.
  template <class Body>
  void run(int n_threads, const Body& body) {
    struct Context {
      Team& team;
      const Body& body;
    } context{*this, body};
    parallel_blocks(
        n_threads, n_threads,
        [](void* pointer, std::int64_t number) {
          const Context& self = *static_cast<const Context*>(pointer);
          Member member(self.team, number);
          claim_tiles();
          self.body(member);
          release_tiles();
        },
        &context);
  }

 private:
  struct alignas(64) Loop {
    std::atomic<std::int64_t> next{0}, done{0};
    std::atomic<std::int64_t> n{-1};  // blocks
  };

 public:
  class Member {
   public:
    Member(Team& team, std::int64_t number) : number(number), loop_(team.loops_) {}

    // From 0 on, in a team of n_threads no two alike: whose part of scratch memory is whose.
    const std::int64_t number;

    // Calls fn(block) once for each block in [0, n), by some member, and returns when all are done.
    // What the members wrote before is seen. n may depend on what earlier loops wrote, even where
    // later ones write over it: what the first member says holds.
    template <class Fn>
    void for_each(std::int64_t n, const Fn& fn) {
      Loop& loop = *loop_++;
      std::int64_t unset = -1;
      if (!loop.n.compare_exchange_strong(unset, n, std::memory_order_acq_rel)) n = unset;
      std::int64_t finished = 0;
      for (;;) {
        const std::int64_t block = loop.next.fetch_add(1, std::memory_order_relaxed);
        if (block >= n) break;
        fn(block);
        ++finished;
      }
      if (finished > 0) loop.done.fetch_add(finished, std::memory_order_acq_rel);
      for (int spins = 0; loop.done.load(std::memory_order_acquire) < n; ++spins) {
        if (spins < 2000) {
          pause();
        } else {
          std::this_thread::yield();  // somebody else needs the core
        }
      }
    }

    // Calls fn() once.
    template <class Fn>
    void once(const Fn& fn) {
      for_each(1, [&](std::int64_t) { fn(); });
    }

   private:
    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
      _mm_pause();
#endif
    }
    Loop* loop_;
  };

 private:
  Loop* loops_;
};

}  // namespace
}  // namespace pyllm::PYLLM_ISA
